"""Log-likelihoods of sequences, and what mutations do to them.

Causal: the exact log-likelihood, one pass. Masked: the pseudo-log-likelihood Σ_i log p(x_i | x without i) (Wang and Cho
2019, arXiv 1902.04094), which takes a pass for every position, so L passes over L tokens; or fewer passes that each
hide several positions at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longseq.evaluation.context import Read
from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.evaluation.log_probabilities import of_tokens
from longseq.evaluation.padded import on_device, padded
from longseq.evaluation.records import BATCH_TOKENS, Record, batches
from longseq.evaluation.variants import Variant
from longseq.models.performer import PerformerLM
from longseq_data.vocabulary import Tokens, Vocabulary

Places = npt.NDArray[np.int64]
Share = list[list[int]]  # variants by number, those that share a pass together


@torch.inference_mode()
def causal(
    model: PerformerLM,
    vocabulary: Vocabulary,
    rows: Sequence[Tokens],
    contexts: Sequence[Read] = (),
    both: bool = False,
) -> list[float]:
    """Σ log p of each row's tokens after the first, its EOS included. Nats.

    contexts: what comes before, in place of the first token; the mean over these. both: the mean with the same of the
    rows whose tokens between the first and EOS come from the last to the first.
    """
    if both:
        directions = rows, [np.concatenate([row[:1], row[-2:0:-1], row[-1:]]) for row in rows]
        return np.mean([causal(model, vocabulary, each, contexts) for each in directions], 0).tolist()
    if contexts:
        return np.mean([_behind(context, vocabulary, rows) for context in contexts], 0).tolist()
    if len(rows) == 1 and len(rows[0]) > BATCH_TOKENS:
        return [_in_tiles(model, rows[0])]
    tokens = padded(rows, vocabulary.pad)
    targets = tokens[:, 1:]
    found = of_tokens(model, _hidden(model, tokens[:, :-1], vocabulary), targets).double()
    return found.masked_fill(targets == vocabulary.pad, 0.0).numpy().sum(1).tolist()


def _behind(context: Read, vocabulary: Vocabulary, rows: Sequence[Tokens]) -> list[float]:
    targets = padded([row[1:] for row in rows], vocabulary.pad)
    total = np.zeros(len(rows))
    for start, hidden in context.hidden(targets):
        own = targets[:, start : start + hidden.shape[1]]
        found = of_tokens(context.model, hidden, own).double()
        total += found.masked_fill(own == vocabulary.pad, 0.0).numpy().sum(1)
    return total.tolist()


def _in_tiles(model: PerformerLM, row: Tokens) -> float:
    """The same of one row of any length."""
    total = 0.0
    for start, hidden in hidden_in_tiles(model, row[:-1]):
        targets = torch.from_numpy(row[start + 1 : start + 1 + hidden.shape[1]].astype(np.int64))
        total += float(of_tokens(model, hidden[0], targets).double().numpy().sum())
    return total


@torch.inference_mode()
def pseudo(model: PerformerLM, vocabulary: Vocabulary, row: Tokens, passes: int) -> float:
    """Σ log p of a row's ordinary tokens, each predicted from a row in which it is masked.

    Args:
        passes: in pass j every position that is j modulo ``passes`` is hidden; 0: each alone, the definition.
    """
    length = len(row) - 2
    passes = min(passes or length, length)
    if len(row) > BATCH_TOKENS:
        return sum(_pass_in_tiles(model, vocabulary, row, turn, passes) for turn in range(passes))
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


def _pass_in_tiles(model: PerformerLM, vocabulary: Vocabulary, row: Tokens, turn: int, passes: int) -> float:
    """One of the passes over a row of any length."""
    total = 0.0
    for start, hidden in hidden_in_tiles(model, _Masked(row, turn, passes, vocabulary.mask)):
        first = (1 + turn - start) % passes if start > turn else 1 + turn - start
        last = min(hidden.shape[1], len(row) - 1 - start)
        targets = torch.from_numpy(row[start + first : start + last : passes].astype(np.int64))
        if len(targets):
            total += float(of_tokens(model, hidden[0, first:last:passes], targets).double().numpy().sum())
    return total


class _Masked:
    """A row whose tokens at 1 + turn, 1 + turn + passes, ... are hidden, but for its ends; no copy of all of it."""

    def __init__(self, row: Tokens, turn: int, passes: int, mask: int):
        self.row, self.first, self.passes, self.mask = row, 1 + turn, passes, mask

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, where: slice) -> Tokens:
        start, stop, _ = where.indices(len(self.row))
        part = self.row[start:stop].copy()
        first = self.first if start <= self.first else start + (self.first - start) % self.passes
        part[first - start : max(0, min(stop, len(self.row) - 1) - start) : self.passes] = self.mask
        return part


def _of_places(model: PerformerLM, row: Tokens, places: Places) -> Iterator[tuple[slice, Tensor]]:
    """What the head reads of some places (n,) of a row of any length, which rise: which of them, and (n', E)."""
    for start, hidden in hidden_in_tiles(model, row):
        first, last = np.searchsorted(places, (start, start + hidden.shape[1]))
        if first < last:
            yield slice(first, last), hidden[0, torch.from_numpy(places[first:last] - start).to(hidden.device)]


def effects(
    model: PerformerLM,
    vocabulary: Vocabulary,
    wild: Record,
    variants: Sequence[Variant],
    is_causal: bool,
    both: bool = False,
) -> Iterator[tuple[Variant, float]]:
    """Log-likelihood of each variant less that of the wild type: below 0 the model finds it less likely. Nats.

    Masked: the masked marginal Σ_sites log p(mutant) − log p(wild type), all sites of the variant masked (Meier et al.
    2021); one pass for each set of sites.
    """
    found = np.empty(len(variants))
    of_share = share_effects(model, vocabulary, wild, variants, is_causal, both=both)
    for share in shares(wild, variants, is_causal):
        numbers = [number for alike in share for number in alike]
        found[numbers] = of_share(share)
        if is_causal:  # they come in their order
            yield from ((variants[number], float(found[number])) for number in numbers)
    if not is_causal:
        yield from zip(variants, found.tolist(), strict=True)


def shares(wild: Record, variants: Sequence[Variant], is_causal: bool, cost: int = 0) -> list[Share]:
    """The variants by number, as they are read by a model at once: several passes, each of variants that share it.

    cost: of a variant, in tokens; 0: those of the wild type.

    Masked: variants of the same sites do, so that a scan of all 19 mutants of each residue takes L passes, not 19 L.
    """
    alike: dict[object, list[int]] = {}
    for number, variant in enumerate(variants):
        alike.setdefault(number if is_causal else _sites(variant), []).append(number)
    return list(batches(alike.values(), lambda _: cost or len(wild.row)))


def share_effects(
    model: PerformerLM,
    vocabulary: Vocabulary,
    wild: Record,
    variants: Sequence[Variant],
    is_causal: bool,
    contexts: Sequence[Read] = (),
    both: bool = False,
) -> Callable[[Share], list[float]]:
    """A function that gives the effects of a share's variants, one after the other."""
    if not is_causal:
        return partial(_masked_effects, model, vocabulary, wild, variants)
    (base,) = causal(model, vocabulary, [wild.row], contexts, both)

    def found(share: Share) -> list[float]:
        rows = [variants[number].applied(wild.row) for (number,) in share]
        scores = causal(model, vocabulary, rows, contexts, both)
        return [score - base for score in scores]

    return found


@torch.inference_mode()
def _masked_effects(
    model: PerformerLM, vocabulary: Vocabulary, wild: Record, variants: Sequence[Variant], share: Share
) -> list[float]:
    group = [_sites(variants[alike[0]]) for alike in share]
    tokens = np.stack([wild.row.astype(np.int64) for _ in group])
    for row, sites in zip(tokens, group, strict=True):
        row[list(sites)] = vocabulary.mask
    found: list[float] = []
    for state, sites, alike in zip(_of_sites(model, vocabulary, tokens, group), group, share, strict=True):
        changes = [sorted(variants[number].changes) for number in alike]
        new = torch.tensor([[to for _, _, to in each] for each in changes])  # (variants, sites)
        old = torch.from_numpy(wild.row[list(sites)].astype(np.int64))
        log_p = of_tokens(model, state, torch.cat([old[None], new]).T).double()  # (sites, 1 + variants)
        found += (log_p[:, 1:] - log_p[:, :1]).sum(0).tolist()
    return found


def _sites(variant: Variant) -> tuple[int, ...]:
    return tuple(sorted(at for at, _, _ in variant.changes))


def _of_sites(
    model: PerformerLM, vocabulary: Vocabulary, tokens: Places, group: Sequence[tuple[int, ...]]
) -> Iterator[Tensor]:
    """What the head reads of each row's sites, (sites, E)."""
    if tokens.shape[1] > BATCH_TOKENS:
        for row, sites in zip(tokens, group, strict=True):
            yield torch.cat([hidden for _, hidden in _of_places(model, row, np.array(sites))])
        return
    for states, sites in zip(_hidden(model, torch.from_numpy(tokens), vocabulary), group, strict=True):
        yield states[list(sites)]


def _hidden(model: PerformerLM, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
    """What the model's head reads, (B, L, E), on the model's device."""
    return model.hidden(*on_device(tokens, vocabulary.pad, next(model.parameters()).device))
