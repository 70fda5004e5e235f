"""Fill in masked positions with a masked model, the surest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longseq.evaluation.generation import Settings, choose
from longseq.evaluation.log_probabilities import in_pieces, refuse_what_is_not_finite
from longseq.models.performer import PerformerLM
from longseq_data.randomness import uniforms
from longseq_data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Filled:
    tokens: tuple[int, ...]  # without the special tokens around them
    log_likelihood: float  # of the filled positions, each as it was when it was chosen


@torch.inference_mode()
def fill(
    model: PerformerLM,
    vocabulary: Vocabulary,
    begins: int,
    tokens: Sequence[int],
    rounds: int,
    settings: Settings,
    number: int = 0,
) -> Filled:
    """Replace every MASK among ``tokens``, the ordinary tokens of one record.

    Each round predicts all positions that are still masked, and keeps the most confident ones for the next
    (Mask-Predict, Ghazvininejad et al. 2019, arXiv 1904.09324, without its second thoughts).

    Args:
        rounds: how many passes of the model; 1: all at once; 0: one for each masked position.
        settings: temperature 0 takes the most probable token.
        number: of the record, which the draws depend on.
    """
    device = next(model.parameters()).device
    row = torch.tensor([[begins, *tokens, vocabulary.eos]])
    never = torch.zeros(vocabulary.size, dtype=torch.bool)
    never[vocabulary.ordinary :] = True
    masked = (row[0] == vocabulary.mask).nonzero()[:, 0].numpy()
    passes = min(rounds or len(masked), len(masked))
    total = 0.0
    for at in range(passes):
        keep = -(-len(masked) // (passes - at))
        hidden = model.hidden(row.to(device))[0, torch.from_numpy(masked).to(device)]  # (masked, E)
        drawn = uniforms(settings.seed, "infill", (np.int64(number) << 32) + masked)
        chosen, sure = np.empty(len(masked), np.int64), np.empty(len(masked))
        for piece, log_probability in in_pieces(model, hidden):
            found = log_probability.cpu()
            refuse_what_is_not_finite(found)
            chosen[piece] = choose(found, drawn[piece], never, settings)
            sure[piece] = found[np.arange(len(found)), chosen[piece]].double().numpy()
        best = np.argsort(-sure, kind="stable")[:keep]
        row[0, torch.from_numpy(masked[best])] = torch.from_numpy(chosen[best])
        total += float(sure[best].sum())
        masked = np.delete(masked, best)
    return Filled(tuple(row[0, 1:-1].tolist()), total)
