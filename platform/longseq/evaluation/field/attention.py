"""Attention maps of a model, read out with one-hot values, as features of pairs of residues."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longseq.attention import FavorAttention
from longseq.evaluation.field.precision import apc
from longseq.evaluation.records import Record
from longseq.measure.attention_probe import look_through
from longseq.models.performer import PerformerLM

Maps = npt.NDArray[np.float32]


@torch.inference_mode()
def attention_maps(model: PerformerLM, record: Record, causal: bool) -> Maps:
    """Attention of every head of every layer between a record's residues, (layers · heads, L, L), queries first.

    A residue's query is where it is predicted: of a causal model one position before it.

    With one-hot vectors as values, attention's result is its weights (Choromanski et al. 2020, appendix C.4): so they
    are those of the implementation that was trained, random features and window included. Memory grows with L².
    """
    found: list[Tensor] = []
    queries = slice(0, -2) if causal else slice(1, -1)

    def look(attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> None:
        size = q.shape[2]
        one_hot = torch.eye(size, device=q.device, dtype=v.dtype).expand(*q.shape[:2], size, size)
        maps = FavorAttention.mix(attention, q, k, one_hot, None, segments)
        found.append(maps[0, :, queries, 1:-1].float().cpu())  # without the tokens before and behind

    device = next(model.parameters()).device
    tokens = torch.from_numpy(record.row.astype(np.int64))[None].to(device)
    look_through(model, {"tokens": tokens}, look)
    return torch.cat(found).numpy()


def pair_features(maps: Maps) -> Maps:
    """Maps (F, L, L) made symmetric, a + aᵀ, and corrected (APC), as ESM's contact head has them (Rao et al. 2021)."""
    return apc(maps + maps.swapaxes(-1, -2))
