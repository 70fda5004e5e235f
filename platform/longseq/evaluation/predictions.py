"""What a model predicts, held to be numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from longseq.errors import LongseqError


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax in fp32 on the CPU, nats: of logits (..., V).

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
