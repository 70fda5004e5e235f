"""What ``trainer.benchmarks`` asks for, by the functions of ``longseq benchmark`` and ``longseq score``.

No torch before a model is read. A benchmark is cut into parts as ``--devices`` cuts it (an assay; variants that a model
reads at once), or is one part where that is not cut, and the ranks share the parts of all benchmarks of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longseq.config.benchmarks import ATTENTION, CONTACTS, PROTEINGYM, STRUCTURE, VARIANTS, Benchmark
from longseq.config.schema import Config
from longseq.data import vocabulary
from longseq.errors import USER_ERRORS, ConfigError, LongseqError
from longseq.evaluation.field.assays import SUBSTITUTIONS, Entry, Scan, collection, scan
from longseq.evaluation.field.averages import averages
from longseq.evaluation.field.chains import Chain, folds, read_chains, spread
from longseq.evaluation.field.measures import spearman
from longseq.evaluation.records import both_directions, record_of
from longseq.evaluation.shards import Job
from longseq.evaluation.variant_request import Variants, asked_for
from longseq.trained_model import Source

if TYPE_CHECKING:
    from longseq.models.performer import PerformerLM


@dataclass(frozen=True)
class Live(Source):
    """A model that is being trained: weights that lie in no file."""

    model: PerformerLM | None = None

    def load(self, device: str | None = None, *, tuned: bool = False) -> PerformerLM:
        assert self.model is not None
        return self.model


def live(config: Config, step: int, model: PerformerLM | None = None) -> Live:
    """The model of a training after so many steps."""
    return Live(Path("the training"), Path(), config, vocabulary(config), step, None, model)


class Watched:
    """One benchmark, its files read."""

    longest: int  # residues of its longest protein
    absent = ""  # what it names and leaves out, in a sentence

    def __init__(self, config: Config, own: Benchmark):
        self.own = own
        self.read(live(config, 0))

    def read(self, source: Source) -> None:
        """Read the files, and hold them against the model's tokens.

        Raises:
            LongseqError, DataError: naming file and line.
        """
        raise NotImplementedError

    def parts(self, source: Source) -> list[Callable[[], Any]]:
        """The parts that the ranks share, as many on each, of which a rank calls its own.

        A part gives what JSON can hold. Raises LongseqError for a model that predicts no numbers.
        """
        raise NotImplementedError

    def points(self, found: Sequence[Any]) -> dict[str, float]:
        """By the curve's name, of what came of all parts; NaN where it is not defined."""
        raise NotImplementedError


class _Assays(Watched):
    def read(self, source: Source) -> None:
        found = collection(Path(self.own.path), None, self.own.assays)
        self.entries: list[Entry] = found.entries
        absent = [name for name in found.absent if name not in [entry.assay.id for entry in self.entries]]
        if absent and self.own.assays:
            raise LongseqError(f"{self.own.path}: assay {absent[0]} has no file here: unpack it, or leave it out.")
        if absent:
            self.absent = f"{len(absent):,} assays of {self.own.path} are left out, as their files are not here."
        self.scans = [self._thinned(scan(entry.file, entry.cutoff)) for entry in self.entries]
        self.longest = 0
        for entry, each in zip(self.entries, self.scans, strict=True):
            wild = record_of(source, entry.assay.id, entry.target, f"{entry.assay.id}, target_seq")
            self.longest = max(self.longest, wild.length)
            if each.kind == SUBSTITUTIONS:
                each.variants(wild)
            else:
                self.longest = max(self.longest, *(mutant.length for mutant in each.sequences(source)))
            _refuse_alike(each.measured.tolist(), str(entry.file))

    def _thinned(self, whole: Scan) -> Scan:
        kept = spread(range(len(whole.mutants)), self.own.records)
        return replace(
            whole,
            mutants=[whole.mutants[number] for number in kept],
            places=[whole.places[number] for number in kept],
            measured=whole.measured[kept],
            fit=None if whole.fit is None else whole.fit[kept],
        )

    def parts(self, source: Source) -> list[Callable[[], Any]]:
        return [partial(self._part, source, *each) for each in zip(self.entries, self.scans, strict=True)]

    def _part(self, source: Source, entry: Entry, each: Scan) -> float:
        from longseq.evaluation.field.fitness import fitness

        found = fitness(source, source.load(), entry, each, 0, both_directions(source, None))
        return found[1].measures["Spearman"]

    def points(self, found: Sequence[Any]) -> dict[str, float]:
        kinds = sorted({each.kind for each in self.scans}, reverse=True)
        points = {}
        for kind in kinds:
            these = [number for number, each in enumerate(self.scans) if each.kind == kind]
            assays = [self.entries[number].assay for number in these]
            values = {self.entries[number].assay.id: found[number] for number in these}
            points["spearman" if kind == kinds[0] else f"spearman_{kind}"] = averages(assays, values).average
        return points


class _Scan(Watched):
    def read(self, source: Source) -> None:
        whole = asked_for(source, self.own.wild_type, (), self.own.path)
        kept = spread(range(len(whole.variants)), self.own.records)
        if None in whole.measured:
            raise LongseqError(f"{self.own.path}: no deep mutational scan: it needs the columns mutant and DMS_score.")
        self.asked = Variants(
            whole.wild, [whole.variants[number] for number in kept], [whole.measured[number] for number in kept]
        )
        self.longest = whole.wild.length
        _refuse_alike(self.asked.measured, self.own.path)

    def parts(self, source: Source) -> list[Callable[[], Any]]:
        from longseq.evaluation.work import Effects

        # One for all parts: it scores the wild type once.
        work = Effects(Job("effects", "", self.own.wild_type, options={"both": both_directions(source, None)}), source)
        work.asked = self.asked
        return [partial(work.rows, group) for group in work.groups()]

    def points(self, found: Sequence[Any]) -> dict[str, float]:
        effects = np.empty(len(self.asked.variants))
        for number, effect in (row for part in found for row in part):
            effects[number] = effect
        return {"spearman": spearman(np.array(self.asked.measured, dtype=np.float64), effects)}


class _Chains(Watched):
    needed = ""

    def read(self, source: Source) -> None:
        self.chains: list[Chain] = spread(read_chains(Path(self.own.path), self.needed), self.own.records)
        if self.own.method == ATTENTION:  # the Jacobian learns nothing
            folds(len(self.chains), self.own.train, 0)
        for chain in self.chains:
            record_of(source, chain.id, chain.sequence, f"chain {chain.id}")
        self.longest = max(len(chain.sequence) for chain in self.chains)

    def parts(self, source: Source) -> list[Callable[[], Any]]:
        return [partial(self._part, source)]

    def _part(self, source: Source) -> dict[str, float]:
        raise NotImplementedError

    def points(self, found: Sequence[Any]) -> dict[str, float]:
        (points,) = found
        return points


class _Contacts(_Chains):
    needed = "contacts"

    def _part(self, source: Source) -> dict[str, float]:
        from longseq.evaluation.field.contacts import benchmark_contacts

        own = self.own
        result = benchmark_contacts(own.path, source, methods=[own.method], train=own.train, records=own.records)
        (model,) = result.models
        return {
            f"{name}_{share.replace('/', '')}": value
            for name, shares in model.precision[self.own.method].items()
            for share, value in shares.items()
        }


class _Structure(_Chains):
    needed = "secondary_structure"

    def _part(self, source: Source) -> dict[str, float]:
        from longseq.evaluation.field.structure import benchmark_structure

        own = self.own
        (model,) = benchmark_structure(own.path, source, train=own.train, records=own.records).models
        return {"accuracy": model.probe.accuracy}


def _refuse_alike(measured: Sequence[float | None], path: str) -> None:
    """Refuse measurements that no effects can be in the order of."""
    if len(set(measured)) < 2:
        raise LongseqError(
            f"{path}: {len(measured):,} mutants of one DMS_score, which have no rank correlation: give more, or "
            "records=0."
        )


_KINDS: dict[str, type[Watched]] = {
    PROTEINGYM: _Assays,
    VARIANTS: _Scan,
    CONTACTS: _Contacts,
    STRUCTURE: _Structure,
}


def watched(config: Config) -> list[Watched]:
    """The benchmarks of a configuration whose paths are resolved, all files read.

    Raises:
        ConfigError: naming the key, and of a file its line.
    """
    found = []
    for number, entry in enumerate(config.trainer.benchmarks):
        at = f"trainer.benchmarks[{number}]"
        if vocabulary(config).name != "protein":
            raise ConfigError(
                f"{at}: about proteins, and the data are read as {vocabulary(config).name}; leave it out."
            )
        try:
            found.append(_KINDS[entry["kind"]](config, Benchmark(**entry)))
        except USER_ERRORS as error:
            raise ConfigError(f"{at}: {error}") from None
        most, longest = config.model.max_positions, found[-1].longest + 2
        if 0 < most < longest:
            raise ConfigError(
                f"{at}: {entry['path']} has a protein of {longest:,} tokens with its ends, and the model has positions "
                f"for {most:,} (model.max_positions): leave it out."
            )
    return found


def shared(numbers: Sequence[int], rank: int, world: int) -> Iterator[tuple[int, int]]:
    """Of benchmarks with so many parts each, the number and part that are a rank's."""
    parts = ((which, part) for which, count in enumerate(numbers) for part in range(count))
    yield from (each for number, each in enumerate(parts) if number % world == rank)
