"""Batches of checkpoints' splits and files, counted in this process or shared by several: the same to the last bit.

What is counted is put together in the order of the sequences. No torch here before something is counted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from io import BufferedReader
from itertools import groupby, product
from typing import IO, TYPE_CHECKING

from longseq.allocator import keep_freed_memory
from longseq.evaluation.request import batch_sequences, plans, samples_of
from longseq.evaluation.shards import Job, Work, done
from longseq.evaluation.tally import Tally, gathered
from longseq.trained_model import Source, find
from longseq_data.samples.rank_share import MakeBatch

if TYPE_CHECKING:
    from longseq.models.performer import PerformerLM

Progress = Callable[[int, int, int], None]  # checkpoint, part and sequences so far
Batch = tuple[int, int, int, MakeBatch | None]  # checkpoint, part, number of the first sequence; None: of no sequence
Row = tuple[int, int, Tally]
_SIZE = 8  # bytes of a row's length in a file


class Tallies(Work[Batch, Row]):
    """What is counted of each batch. Options: folders, parts (splits and files), sequences of each at most, top_k."""

    def __init__(self, job: Job, source: Source | None = None, sources: Sequence[Source] = ()):
        self.job, self.parts = job, job.options["parts"]
        self.sources = list(sources) or [
            find(folder, job.overrides, ema=job.ema, sums=False) for folder in job.options["folders"]
        ]
        self.source = source or self.sources[0]
        self.loaded: Callable[[int], PerformerLM] = lru_cache(1)(lambda number: self.sources[number].load())
        self.samples = lru_cache(1)(lambda number, part: samples_of(self.sources[number], self.parts[part]))

    def groups(self) -> Iterator[Batch]:
        for number, part in product(range(len(self.sources)), range(len(self.parts))):
            yield number, part, 0, None
            at_once, first = batch_sequences(self.sources[number].config), 0
            for make in plans(self.samples(number, part), at_once, self.job.options["sequences"]):
                yield number, part, first, make
                first += at_once

    def rows(self, group: Batch) -> list[Row]:
        from longseq.evaluation.split_scores import empty, of_batch

        number, part, first, make = group
        samples = self.samples(number, part)
        if make is None:
            return [(number, part, empty(samples))]
        return [(number, part, of_batch(self.loaded(number), samples, make, first, self.job.options["top_k"]))]

    def write(self, file: IO[bytes], rows: list[Row]) -> None:
        for number, part, tally in rows:
            content = io.BytesIO()
            tally.save(content)
            for value in (number, part, content.tell()):
                file.write(value.to_bytes(_SIZE, "little"))
            file.write(content.getbuffer())

    def read(self, file: BufferedReader) -> Iterator[Row]:
        while file.peek(1):
            number, part, size = (int.from_bytes(file.read(_SIZE), "little") for _ in range(3))
            yield number, part, Tally.load(io.BytesIO(file.read(size)))


def scored(work: Tallies, devices: int, progress: Progress) -> Iterator[Row]:
    """The numbers of a checkpoint and a part, and what was counted there, one after the other as they are done.

    Raises:
        LongseqError, DataError: what went wrong, in one sentence.
    """

    def told(rows: Iterator[Row]) -> Iterator[Tally]:
        sequences = 0
        for number, part, tally in rows:
            sequences += len(tally.number)
            progress(number, part, sequences)
            yield tally

    if devices == 1:
        import torch

        if not torch.cuda.is_available():
            keep_freed_memory()
    for (number, part), rows in groupby(done(work, devices), key=lambda row: row[:2]):
        yield number, part, gathered(told(rows))
