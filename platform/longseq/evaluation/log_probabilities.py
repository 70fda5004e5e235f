"""What a model predicts, held to be numbers. The logits of a few thousand positions exist at a time, never of all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longseq.errors import LongseqError
from longseq.models.head import rows_at_once
from longseq.models.performer import PerformerLM


def in_pieces(model: PerformerLM, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Log-softmax of a row of positions, piece by piece, in fp32 on the model's device.

    Args:
        hidden: (N, E), what the model's head reads.

    Yields:
        Which positions, and their log-probabilities (n, V), nats.
    """
    size = rows_at_once(model.spec.vocabulary)
    for start in range(0, len(hidden), size):
        piece = slice(start, min(start + size, len(hidden)))
        yield piece, model.head(hidden[piece]).float().log_softmax(-1)


def of_tokens(model: PerformerLM, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of given tokens in fp32 on the CPU, nats.

    Args:
        hidden: (..., E), what the model's head reads.
        tokens: (...) ids; or (..., K), several of each position.

    Raises:
        LongseqError: if one is no finite number.
    """
    rows = hidden.flatten(0, -2)
    wanted = (tokens if tokens.ndim == hidden.ndim else tokens[..., None]).to(rows.device).flatten(0, -2)  # (N, K)
    parts = [probabilities.gather(-1, wanted[piece]).cpu() for piece, probabilities in in_pieces(model, rows)]
    found = torch.cat([torch.zeros(0, wanted.shape[1]), *parts])
    refuse_what_is_not_finite(found)
    return found.view(tokens.shape)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax in fp32 on the CPU, nats: of logits (..., V) of a few positions.

    Raises:
        LongseqError: if one is no finite number.
    """
    found = logits.float().log_softmax(-1).cpu()
    refuse_what_is_not_finite(found)
    return found


def refuse_what_is_not_finite(values: Tensor) -> None:
    """Hold predictions to be numbers, before anything is made of them.

    Raises:
        LongseqError: if one is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise LongseqError(
            "the model predicts what is no number (NaN or infinite): take the attention.* that it was trained with, "
            "or another checkpoint."
        )
