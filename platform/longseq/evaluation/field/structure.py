"""Secondary structure in a model's vectors: what ``longseq benchmark structure`` does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longseq.errors import LongseqError
from longseq.evaluation.field.chains import STATES, Chain, folds, read_chains, spread
from longseq.evaluation.field.models import label, proteins
from longseq.printed import plain
from longseq.trained_model import Source
from longseq_data.vocabulary import LETTERS, RESIDUES

if TYPE_CHECKING:
    Vectors = Sequence[npt.NDArray[np.floating]]  # (L, E) of each chain

Progress = Callable[[str], None]  # model


@dataclass(frozen=True)
class Probe:
    """How well a linear probe tells the three states."""

    accuracy: float  # share of all residues, Q3
    recall: dict[str, float]  # of each state: of its residues, the share that is told; NaN where there are none


@dataclass(frozen=True)
class StructureResult:
    """One model."""

    name: str
    step: int
    objective: str
    probe: Probe


@dataclass(frozen=True)
class StructureBenchmark:
    """What :func:`benchmark_structure` returns."""

    models: list[StructureResult]
    letters: Probe  # the same probe on the residues alone, one-hot
    most_frequent: float  # accuracy of always saying the commonest state
    chains: int
    residues: int

    def as_dict(self) -> dict[str, Any]:
        """What ``longseq benchmark structure --json`` prints."""
        return plain(asdict(self))


def benchmark_structure(
    file: str | Path,
    targets: str | Path | Source | Iterable[str | Path | Source],
    overrides: Sequence[str] = (),
    *,
    layer: int | None = None,
    train: int = 20,
    seed: int = 0,
    records: int = 0,
    ema: bool = False,
    progress: Progress = lambda _: None,
) -> StructureBenchmark:
    """Accuracy of helix, strand or neither (DSSP), residue by residue, of a linear probe on frozen vectors.

    The probe is a softmax regression with a ridge of 1 on vectors scaled by their deviation, learned from ``train``
    chains; every chain is tested by a probe that has not seen it.

    Args:
        file: chains as :func:`longseq.evaluation.field.chains.read_chains` reads them.
        targets: runs, checkpoints, exported folders, or what ``longseq.find`` returned; one or several.
        overrides: ``section.key=value`` on top of each run's configuration.
        layer: 0: the embedding, k: after block k; None: after the final norm, which is what the head reads.
        train: chains that a probe learns from.
        seed: of the order in which chains are learned from and tested.
        records: at most so many chains, spread evenly over the file; 0: all.
        ema: with the running mean of the weights.
        progress: called with each model's name.

    Raises:
        LongseqError: in one sentence, for a model or a file that cannot be used, and too few chains.
    """
    sources = proteins(targets, overrides, ema)
    for source in sources:
        if layer is not None and not 0 <= layer <= source.spec.depth:
            raise LongseqError(
                f"layer={layer}: {source.name} has {source.spec.depth} blocks; take 0 to {source.spec.depth}."
            )
    chains = spread(read_chains(Path(file), "secondary_structure"), records)
    ways = folds(len(chains), train, seed)
    states = [np.array([STATES.index(state) for state in chain.states or ""]) for chain in chains]
    models = []
    for source in sources:
        progress(source.name)
        probe = _probe(_vectors(source, chains, layer), states, ways)
        models.append(StructureResult(label(source, sources), source.step, source.config.model.objective, probe))
    counts = np.bincount(np.concatenate(states), minlength=len(STATES))
    letters = _probe([_one_hot(chain.sequence) for chain in chains], states, ways)
    return StructureBenchmark(models, letters, float(counts.max() / counts.sum()), len(chains), int(counts.sum()))


def _vectors(source: Source, chains: Sequence[Chain], layer: int | None) -> Vectors:
    from longseq.evaluation.hidden_vectors import vectors
    from longseq.evaluation.records import record_of

    records = [record_of(source, chain.id, chain.sequence, f"chain {chain.id}") for chain in chains]
    found = vectors(source.load(), source.vocabulary, records, layer)
    return [each.residues for each in found if each.residues is not None]


def _one_hot(sequence: str) -> npt.NDArray[np.floating]:
    return np.eye(RESIDUES)[[LETTERS.index(letter) for letter in sequence]]


def _probe(
    features: Vectors, states: Sequence[npt.NDArray[np.int64]], ways: Sequence[tuple[list[int], list[int]]]
) -> Probe:
    from longseq.evaluation.field.regression import Scaled, softmax_regression

    told = [np.zeros(0, dtype=np.int64)] * len(states)
    for learned, tested in ways:
        given = np.concatenate([features[index] for index in learned])
        scaled = Scaled.of(given)
        weights = softmax_regression(scaled(given), np.concatenate([states[index] for index in learned]), len(STATES))
        matrix = weights.numpy()
        for index in tested:
            told[index] = (scaled(features[index]) @ matrix[:-1] + matrix[-1]).argmax(1)
    right, truth = np.concatenate(told) == np.concatenate(states), np.concatenate(states)
    recall = {
        name: float(right[truth == number].mean()) if (truth == number).any() else float("nan")
        for number, name in enumerate(STATES)
    }
    return Probe(float(right.mean()), recall)
