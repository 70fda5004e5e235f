"""Contacts that a model knows of: what ``longseq benchmark contacts`` does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longseq.config.benchmarks import ATTENTION, METHODS
from longseq.errors import LongseqError
from longseq.evaluation.field.chains import Chain, folds, read_chains, spread
from longseq.evaluation.field.models import label, proteins
from longseq.evaluation.field.precision import NEAREST, Matrix, Precision, chance, mean_precision, precisions
from longseq.printed import plain
from longseq.trained_model import Source

if TYPE_CHECKING:
    from longseq.evaluation.records import Record
    from longseq.models.performer import PerformerLM

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
        progress: called with the model's name, the method and the chain's id before each.

    Raises:
        LongseqError: in one sentence, for a model or a file that cannot be used, and too few chains.
    """
    for method in methods:
        if method not in METHODS:
            raise LongseqError(f"methods={method}: take {' or '.join(METHODS)}.")
    from longseq.evaluation.records import record_of

    sources = proteins(targets, overrides, ema)
    chains = spread(read_chains(Path(file), "contacts"), records)
    ways = folds(len(chains), train, seed) if ATTENTION in methods else []
    models = []
    for source in sources:
        name = label(source, sources)
        model = source.load()
        read = [record_of(source, chain.id, chain.sequence, f"chain {chain.id}") for chain in chains]
        found: dict[str, list[Precision]] = {}
        for method in methods:
            say = partial(progress, name, method)
            if method == ATTENTION:
                scores = _by_attention(model, read, chains, ways, source.causal, say)
            else:
                scores = _by_jacobian(model, read, source.causal, say)
            found[method] = [precisions(each, chain.contact_map()) for each, chain in zip(scores, chains, strict=True)]
        by_chain = {
            method: {chain.id: each for chain, each in zip(chains, of, strict=True)} for method, of in found.items()
        }
        mean = {method: mean_precision(each) for method, each in found.items()}
        models.append(ContactResult(name, source.step, source.config.model.objective, mean, by_chain))
    return ContactBenchmark(models, mean_precision([chance(chain.contact_map()) for chain in chains]), len(chains))


def _by_attention(
    model: PerformerLM,
    records: Sequence[Record],
    chains: Sequence[Chain],
    ways: Sequence[tuple[list[int], list[int]]],
    causal: bool,
    progress: Callable[[str], None],
) -> list[Matrix]:
    from longseq.evaluation.field.attention import attention_maps, pair_features
    from longseq.evaluation.field.regression import Scaled, sparse_logistic

    features, labels = [], []
    for record, chain in zip(records, chains, strict=True):
        progress(record.identifier)
        pairs = np.triu_indices(record.length, NEAREST)
        features.append(pair_features(attention_maps(model, record, causal))[:, *pairs].T)  # (pairs, heads)
        labels.append(chain.contact_map()[pairs])
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
            length = records[index].length
            scores = np.zeros((length, length))
            scores[np.triu_indices(length, NEAREST)] = scaled(features[index]) @ weights
            found[index] = scores + scores.T
    return found


def _by_jacobian(
    model: PerformerLM, records: Sequence[Record], causal: bool, progress: Callable[[str], None]
) -> list[Matrix]:
    from longseq.evaluation.field.jacobian import categorical_jacobian, coupling_scores

    found = []
    for record in records:
        progress(record.identifier)
        found.append(coupling_scores(categorical_jacobian(model, record, causal)))
    return found
