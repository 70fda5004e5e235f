"""What models make of a file's chains, chain by chain, as work that processes share. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longseq.evaluation.field.chains import Chain, read_chains, spread
from longseq.evaluation.records import Record, record_of
from longseq.evaluation.shards import Job, Work
from longseq.trained_model import Source, find

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longseq.models.performer import PerformerLM

Array = npt.NDArray[Any]


class OfChains(Work[Any, Array]):
    """Rows are arrays, kept as NumPy writes them. Options: targets, what ``find`` takes, and records, at most
    so many chains."""

    needed: str  # contacts or secondary_structure

    def __init__(self, job: Job, source: Source | None = None, sources: Sequence[Source] = ()):
        self.job = job
        self.sources = list(sources) or [
            find(target, job.overrides, ema=job.ema, sums=False) for target in job.options["targets"]
        ]
        self.source = source or self.sources[0]
        self.loaded = lru_cache(1)(lambda number: self.sources[number].load())  # one model at a time

    @cached_property
    def chains(self) -> list[Chain]:
        found = spread(read_chains(Path(self.job.file), self.needed), self.job.options["records"])
        for chain in found:  # what cannot be read is refused before anything is computed
            self.record(0, chain)
        return found

    def model_of(self, number: int) -> PerformerLM:
        return self.loaded(number)

    def record(self, number: int, chain: Chain) -> Record:
        """A chain as a model reads it."""
        return record_of(self.sources[number], chain.id, chain.sequence, f"chain {chain.id}")

    def write(self, file: IO[bytes], rows: list[Array]) -> None:
        for row in rows:
            np.save(file, row)

    def read(self, file: BufferedReader) -> Iterator[Array]:
        while file.peek(1):
            yield np.load(file)


def job_of(
    kind: str, sources: Sequence[Source], file: str | Path, overrides: Sequence[str], ema: bool, **options: Any
) -> Job:
    """A job on the chains of a file."""
    targets = [str(source.folder) for source in sources]
    return Job(kind, targets[0], str(file), tuple(overrides), ema, {"targets": targets, **options})
