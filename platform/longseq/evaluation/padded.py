"""Rows of several lengths as the one tensor that a model reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longseq_data.vocabulary import Tokens


def padded(rows: Sequence[Tokens], pad: int) -> Tensor:
    """(B, L) int64: the rows, with ``pad`` behind those that are shorter than the longest."""
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens


def on_device(tokens: Tensor, pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The tokens on a device, and which of them are real, (B, L) bool; None: all are."""
    real = tokens != pad
    return tokens.to(device), None if bool(real.all()) else real.to(device)
