"""Contacts that a model knows of: what ``longseq benchmark contacts`` does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from longseq.config.benchmarks import ATTENTION, JACOBIAN, METHODS
from longseq.errors import LongseqError
from longseq.evaluation.field.chain_work import Array, OfChains, job_of
from longseq.evaluation.field.chains import Chain, folds
from longseq.evaluation.field.models import label, proteins
from longseq.evaluation.field.precision import NEAREST, Matrix, Precision, chance, mean_precision, precisions
from longseq.evaluation.shards import done, refuse_devices
from longseq.printed import plain
from longseq.trained_model import Source

Progress = Callable[[str, str, str], None]  # model, method, chain

C = 0.15  # of ESM's regression (Rao et al. 2021)


@dataclass(frozen=True)
class ContactResult:
    """One model. Precision is by method, then range of separations (short, medium, long, all), then share of L."""

    name: str
    step: int
    objective: str
    precision: dict[str, Precision]  # the mean over chains
    chains: dict[str, dict[str, Precision]]  # by method and the chain's id


@dataclass(frozen=True)
class ContactBenchmark:
    """What :func:`benchmark_contacts` returns."""

    models: list[ContactResult]
    chance: Precision  # what random pairs reach: the share of a range's pairs that touch
    chains: int

    def as_dict(self) -> dict[str, Any]:
        """What ``longseq benchmark contacts --json`` prints."""
        return plain(asdict(self))


def benchmark_contacts(
    file: str | Path,
    targets: str | Path | Source | Iterable[str | Path | Source],
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = METHODS,
    train: int = 20,
    seed: int = 0,
    records: int = 0,
    ema: bool = False,
    devices: int = 1,
    progress: Progress = lambda *_: None,
) -> ContactBenchmark:
    """Precision of the L, L/2 and L/5 surest pairs of residues at least 6 apart.

    "attention": a logistic regression (L1, C = 0.15) on the maps of all heads, symmetric and corrected (APC), learned
    from ``train`` chains, as for ESM (Rao et al. 2021, bioRxiv 2020.12.15.422761); features are scaled by their
    deviation, as a Performer's maps may be flat. Every chain is tested by a regression that has not seen it.
    "jacobian": the categorical Jacobian (Zhang et al. 2024, PNAS 121(45)), which learns nothing; 20 passes for each
    residue.

    Args:
        file: chains as :func:`longseq.evaluation.field.chains.read_chains` reads them.
        targets: runs, checkpoints, exported folders, or what ``longseq.find`` returned; one or several.
        overrides: ``section.key=value`` on top of each run's configuration.
        train: chains that a regression learns from.
        seed: of the order in which chains are learned from and tested.
        records: at most so many chains, spread evenly over the file; 0: all.
        ema: with the running mean of the weights.
        devices: processes that share the chains; results are the same to the last bit.
        progress: called with the model's name, the method and the chain's id before each.

    Raises:
        LongseqError: in one sentence, for a model or a file that cannot be used, and too few chains.
    """
    for method in methods:
        if method not in METHODS:
            raise LongseqError(f"methods={method}: take {' or '.join(METHODS)}.")
    refuse_devices(devices)
    sources = proteins(targets, overrides, ema)
    options = {"methods": list(methods), "records": records}
    work = Pairs(job_of("contacts", sources, file, overrides, ema, **options), sources=sources)
    chains = work.chains
    ways = folds(len(chains), train, seed) if ATTENTION in methods else []
    rows = done(work, devices)
    models = []
    for source in sources:
        name = label(source, sources)
        found: dict[str, list[Precision]] = {}
        for method in methods:
            made = []
            for chain in chains:
                progress(name, method, chain.id)
                made.append(next(rows))
            scores = _by_attention(made, chains, ways) if method == ATTENTION else made
            found[method] = [precisions(each, chain.contact_map()) for each, chain in zip(scores, chains, strict=True)]
        by_chain = {
            method: {chain.id: each for chain, each in zip(chains, of, strict=True)} for method, of in found.items()
        }
        mean = {method: mean_precision(each) for method, each in found.items()}
        models.append(ContactResult(name, source.step, source.config.model.objective, mean, by_chain))
    next(rows, None)  # it ends: nothing is kept of it
    return ContactBenchmark(models, mean_precision([chance(chain.contact_map()) for chain in chains]), len(chains))


class Pairs(OfChains):
    """What a regression learns from, (pairs, heads), or of the Jacobian the scores of pairs, (L, L): of each model, by
    each method, of each chain. Option: methods."""

    needed = "contacts"

    def groups(self) -> Iterator[tuple[int, str, int]]:
        return product(range(len(self.sources)), self.job.options["methods"], range(len(self.chains)))

    def rows(self, group: tuple[int, str, int]) -> list[Array]:
        from longseq.evaluation.field.attention import attention_maps, pair_features
        from longseq.evaluation.field.jacobian import categorical_jacobian, coupling_scores

        number, method, index = group
        model, record = self.model_of(number), self.record(number, self.chains[index])
        causal = self.sources[number].causal
        if method == JACOBIAN:
            return [coupling_scores(categorical_jacobian(model, record, causal))]
        pairs = np.triu_indices(record.length, NEAREST)
        return [pair_features(attention_maps(model, record, causal))[:, *pairs].T]


def _by_attention(
    features: Sequence[Array], chains: Sequence[Chain], ways: Sequence[tuple[list[int], list[int]]]
) -> list[Matrix]:
    from longseq.evaluation.field.regression import Scaled, sparse_logistic

    places = [np.triu_indices(len(chain.sequence), NEAREST) for chain in chains]
    labels = [chain.contact_map()[pairs] for chain, pairs in zip(chains, places, strict=True)]
    found: list[Matrix] = [np.empty(0)] * len(chains)
    for learned, tested in ways:
        if not any(len(features[index]) for index in learned):
            raise LongseqError(
                f"chain {chains[learned[0]].id}: nothing can be learned where no two residues are {NEAREST} apart; "
                "leave short chains out, or raise --train."
            )
        scaled = Scaled.of(np.concatenate([features[index] for index in learned]))
        given = np.concatenate([scaled(features[index]) for index in learned])
        weights, _ = sparse_logistic(given, np.concatenate([labels[index] for index in learned]), C)
        for index in tested:
            length = len(chains[index].sequence)
            scores = np.zeros((length, length))
            scores[places[index]] = scaled(features[index]) @ weights
            found[index] = scores + scores.T
    return found
