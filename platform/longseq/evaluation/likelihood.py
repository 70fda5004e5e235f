"""Log-likelihoods of sequences, and what mutations do to them.

Causal: the exact log-likelihood, one pass. Masked: the pseudo-log-likelihood Σ_i log p(x_i | x without i) (Wang and Cho
2019, arXiv 1902.04094), which takes a pass for every position, so L passes over L tokens; or fewer passes that each
hide several positions at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from longseq.evaluation.predictions import of_tokens
from longseq.evaluation.records import BATCH_TOKENS, Record, batches
from longseq.evaluation.variants import Variant
from longseq.models.performer import PerformerLM
from longseq_data.vocabulary import Tokens, Vocabulary


@torch.inference_mode()
def causal(model: PerformerLM, vocabulary: Vocabulary, rows: Sequence[Tokens]) -> list[float]:
    """Σ log p of each row's tokens after the first, its EOS included. Nats."""
    tokens = _padded(rows, vocabulary.pad)
    targets = tokens[:, 1:]
    found = of_tokens(model, _hidden(model, tokens[:, :-1], vocabulary), targets).double()
    return found.masked_fill(targets == vocabulary.pad, 0.0).numpy().sum(1).tolist()


@torch.inference_mode()
def pseudo(model: PerformerLM, vocabulary: Vocabulary, row: Tokens, passes: int) -> float:
    """Σ log p of a row's ordinary tokens, each predicted from a row in which it is masked.

    Args:
        passes: in pass j every position that is j modulo ``passes`` is hidden; 0: each alone, the definition.
    """
    length = len(row) - 2
    passes = min(passes or length, length)
    base = torch.from_numpy(row.astype(np.int64))
    places = torch.arange(1, length + 1)
    total = 0.0
    at_once = max(1, BATCH_TOKENS // len(row))
    for first in range(0, passes, at_once):
        turns = torch.arange(first, min(first + at_once, passes))
        hidden = torch.zeros(len(turns), len(row), dtype=torch.bool)
        hidden[:, 1:-1] = (places - 1) % passes == turns[:, None]
        tokens = base.expand(len(turns), -1).masked_fill(hidden, vocabulary.mask)
        states = _hidden(model, tokens, vocabulary)
        states = states[hidden.to(states.device)]
        total += float(of_tokens(model, states, base.expand(len(turns), -1)[hidden]).double().numpy().sum())
    return total


def effects(
    model: PerformerLM, vocabulary: Vocabulary, wild: Record, variants: Sequence[Variant], is_causal: bool
) -> Iterator[tuple[Variant, float]]:
    """Log-likelihood of each variant less that of the wild type: below 0 the model finds it less likely. Nats.

    Masked: the masked marginal Σ_sites log p(mutant) − log p(wild type), all sites of the variant masked (Meier et al.
    2021); one pass for each set of sites.
    """
    return (_causal_effects if is_causal else _masked_effects)(model, vocabulary, wild, variants)


def _causal_effects(
    model: PerformerLM, vocabulary: Vocabulary, wild: Record, variants: Sequence[Variant]
) -> Iterator[tuple[Variant, float]]:
    (base,) = causal(model, vocabulary, [wild.row])
    for group in batches(variants, lambda _: len(wild.row)):
        scores = causal(model, vocabulary, [variant.applied(wild.row) for variant in group])
        yield from ((variant, score - base) for variant, score in zip(group, scores, strict=True))


@torch.inference_mode()
def _masked_effects(
    model: PerformerLM, vocabulary: Vocabulary, wild: Record, variants: Sequence[Variant]
) -> Iterator[tuple[Variant, float]]:
    """Variants of the same sites share a pass: a scan of all 19 mutants of each residue takes L passes, not 19 L."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, variant in enumerate(variants):
        alike.setdefault(tuple(sorted(at for at, _, _ in variant.changes)), []).append(number)
    found = np.empty(len(variants))
    for group in batches(alike, lambda _: len(wild.row)):
        tokens = np.stack([wild.row.astype(np.int64) for _ in group])
        for row, sites in zip(tokens, group, strict=True):
            row[list(sites)] = vocabulary.mask
        states = _hidden(model, torch.from_numpy(tokens), vocabulary)
        for row, sites in zip(states, group, strict=True):
            places = list(sites)
            changes = [sorted(variants[number].changes) for number in alike[sites]]
            new = torch.tensor([[to for _, _, to in each] for each in changes])  # (variants, sites)
            old = torch.from_numpy(wild.row[places].astype(np.int64))
            log_p = of_tokens(model, row[places], torch.cat([old[None], new]).T).double()  # (sites, 1 + variants)
            found[alike[sites]] = (log_p[:, 1:] - log_p[:, :1]).sum(0).numpy()
    yield from zip(variants, found.tolist(), strict=True)


def _hidden(model: PerformerLM, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
    """What the model's head reads, (B, L, E), on the model's device."""
    device = next(model.parameters()).device
    real = tokens != vocabulary.pad
    padding = None if bool(real.all()) else real.to(device)
    return model.hidden(tokens.to(device), padding)


def _padded(rows: Sequence[Tokens], pad: int) -> Tensor:
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens
