"""Where tokens stand in their documents: in packed rows, in rows padded in front, and in slices of a sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import ContextGroup, SlicedDocuments


def positions_of(tokens: Tensor, padding: Tensor | None, segments: Tensor | None) -> Tensor:
    """Each token's position in its document, (L,) or (B, L): rows may be packed, or padded in front.

    Random features of a rotated query and key depend on both positions, their expectation alone on the difference. So
    a document gives the same wherever it stands only if its positions do not tell where that is.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if segments is not None:
        border = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        return positions - (positions * border).cummax(1).values
    if padding is not None:
        return (positions - leading(padding)[:, None]).clamp_(min=0)
    return positions


def positions_of_slice(tokens: Tensor, documents: SlicedDocuments | None, context: ContextGroup) -> Tensor:
    """The same for a slice of a sequence."""
    if documents is None:
        size = tokens.shape[1]
        return torch.arange(context.rank * size, (context.rank + 1) * size, device=tokens.device)
    positions = positions_of(tokens, None, documents.segments)
    segments = documents.segments
    begun = (segments == segments[:, :1]).cumprod(1)  # still in the document that the slice begins in
    return positions + begun * documents.before[context.rank][:, None]


def leading(padding: Tensor) -> Tensor:
    """How many hidden tokens each row begins with: (B,)."""
    return (padding.cumsum(1) == 0).sum(1)
