"""Secondary structure in a model's vectors: what ``longseq benchmark structure`` does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq.errors import LongseqError
from longseq.evaluation.field.chain_work import Array, OfChains, job_of
from longseq.evaluation.field.chains import STATES, folds
from longseq.evaluation.field.models import label, proteins
from longseq.evaluation.records import Record, batches
from longseq.evaluation.shards import done, refuse_devices
from longseq.printed import plain
from longseq.trained_model import Source
from longseq_data.vocabulary import LETTERS, RESIDUES

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
    devices: int = 1,
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
        devices: processes that share the chains; results are the same to the last bit.
        progress: called with each model's name.

    Raises:
        LongseqError: in one sentence, for a model or a file that cannot be used, and too few chains.
    """
    refuse_devices(devices)
    sources = proteins(targets, overrides, ema)
    for source in sources:
        if layer is not None and not 0 <= layer <= source.spec.depth:
            raise LongseqError(
                f"layer={layer}: {source.name} has {source.spec.depth} blocks; take 0 to {source.spec.depth}."
            )
    options = {"layer": layer, "records": records}
    work = Residues(job_of("structure", sources, file, overrides, ema, **options), sources=sources)
    chains = work.chains
    ways = folds(len(chains), train, seed)
    states = [np.array([STATES.index(state) for state in chain.states or ""]) for chain in chains]
    rows = done(work, devices)
    models = []
    for source in sources:
        progress(source.name)
        probe = _probe(list(islice(rows, len(chains))), states, ways)
        models.append(StructureResult(label(source, sources), source.step, source.config.model.objective, probe))
    next(rows, None)  # it ends: nothing is kept of it
    counts = np.bincount(np.concatenate(states), minlength=len(STATES))
    letters = _probe([_one_hot(chain.sequence) for chain in chains], states, ways)
    return StructureBenchmark(models, letters, float(counts.max() / counts.sum()), len(chains), int(counts.sum()))


class Residues(OfChains):
    """Vectors of residues, (L, E), of each model and chain. Option: layer."""

    needed = "secondary_structure"

    def groups(self) -> Iterator[tuple[int, list[Record]]]:
        for number in range(len(self.sources)):
            records = (self.record(number, chain) for chain in self.chains)
            yield from ((number, group) for group in batches(records, lambda record: len(record.row)))

    def rows(self, group: tuple[int, list[Record]]) -> list[Array]:
        from longseq.evaluation.hidden_vectors import of_batch
        from longseq.evaluation.vector_options import Wanted

        number, records = group
        vocabulary, layer = self.sources[number].vocabulary, self.job.options["layer"]
        found = of_batch(self.model_of(number), vocabulary, records, Wanted((layer,)))
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
