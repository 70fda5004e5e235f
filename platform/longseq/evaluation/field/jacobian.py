"""The categorical Jacobian: which residues' predictions change with which residue (Zhang et al. 2024, PNAS 121(45))."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from longseq.evaluation.field.precision import Matrix, apc
from longseq.evaluation.log_probabilities import refuse_what_is_not_finite
from longseq.evaluation.records import BATCH_TOKENS, Record
from longseq.models.performer import PerformerLM
from longseq_data.vocabulary import STANDARD


@torch.inference_mode()
def categorical_jacobian(model: PerformerLM, record: Record, causal: bool) -> npt.NDArray[np.float32]:
    """Change of every logit with every substitution, (L, 20, L, 20): at position i to residue a, at j of residue b.

    20 L passes over the unmasked sequence, and 1,600 L² bytes. Of a causal model a position's logits are those that
    predict it, from the residues before: nothing changes before i.
    """
    device = next(model.parameters()).device
    row = torch.from_numpy(record.row.astype(np.int64)).to(device)
    length, size = record.length, STANDARD
    read = slice(0, length) if causal else slice(1, length + 1)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model.head(model.hidden(tokens)[:, read])[..., :size].float().cpu()

    before = logits(row[None])[0]
    refuse_what_is_not_finite(before)
    found = np.empty((length * size, length, size), dtype=np.float32)
    at_once = max(1, BATCH_TOKENS // len(row))
    for first in range(0, length * size, at_once):
        which = torch.arange(first, min(first + at_once, length * size), device=device)
        tokens = row.repeat(len(which), 1)
        tokens[torch.arange(len(which), device=device), 1 + which // size] = which % size
        found[first : first + len(which)] = (logits(tokens) - before).numpy()
    return found.reshape(length, size, length, size)


def coupling_scores(jacobian: npt.NDArray[np.float32]) -> Matrix:
    """Scores of pairs of residues, (L, L): the Jacobian centred on all four axes and made symmetric, the Frobenius norm
    of each pair's 20 × 20 block, less the average product. Overwrites its argument."""
    for axis in range(4):
        jacobian -= jacobian.mean(axis, keepdims=True)
    norms = np.empty((len(jacobian),) * 2)
    for i in range(len(jacobian)):  # a row at a time: the symmetric one need not exist
        block = (jacobian[i] + jacobian[:, :, i].transpose(2, 0, 1)) / 2  # (a, j, b)
        norms[i] = np.sqrt(np.square(block, dtype=np.float64).sum((0, 2)))
    np.fill_diagonal(norms, 0)
    return apc(norms)
