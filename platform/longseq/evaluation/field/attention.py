"""Attention maps of a model, read out with one-hot values, as features of pairs of residues."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from longseq.evaluation.field.precision import apc
from longseq.evaluation.records import Record
from longseq.measure.attention_probe import attention_weights
from longseq.models.performer import PerformerLM

Maps = npt.NDArray[np.float32]


@torch.inference_mode()
def attention_maps(model: PerformerLM, record: Record, causal: bool) -> Maps:
    """Attention of every head of every layer between a record's residues, (layers · heads, L, L), queries first.

    A residue's query is where it is predicted: of a causal model one position before it.

    With one-hot vectors as values, attention's result is its weights (Choromanski et al. 2020, appendix C.4): so they
    are those of the implementation that was trained, random features and window included. Memory grows with L².
    """
    queries = slice(0, -2) if causal else slice(1, -1)
    device = next(model.parameters()).device
    tokens = torch.from_numpy(record.row.astype(np.int64))[None].to(device)
    return torch.cat([layer[0, :, queries, 1:-1].cpu() for layer in attention_weights(model, tokens)]).numpy()


def pair_features(maps: Maps) -> Maps:
    """Maps (F, L, L) made symmetric, a + aᵀ, and corrected (APC), as ESM's contact head has them (Rao et al. 2021)."""
    return apc(maps + maps.swapaxes(-1, -2))
