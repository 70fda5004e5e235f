"""Batches of the endless order: which rank and which worker gets which sample.

A rank takes its samples by their number in the global order, so the samples of an optimiser step do not depend on how
many ranks, workers or micro-batches share the work, and a resume needs nothing but the number of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .errors import DataError
from .streaming import Sample, StreamSpec, evaluation_windows, training_windows
from .vocabulary import IGNORE, PROTEIN, Vocabulary

Batch = dict[str, Tensor]
Item = TypeVar("Item")


class TrainingBatches(IterableDataset[Batch]):
    """Endless micro-batches of one rank.

    Optimiser step s takes the global samples [s·G, (s+1)·G), G = world · accumulate · batch_sequences. Sample g belongs
    to rank g mod world; the samples of a rank, in ascending order, form ``accumulate`` micro-batches. Worker w of W
    yields every W-th micro-batch, which is the order in which a DataLoader asks for them.

    Each batch holds, with B = batch_sequences and L the longest sample of the micro-batch:
        tokens        (B, L) int64, the vocabulary's pad after the end of a sample
        targets       (B, L) int64, IGNORE where nothing is scored
        segments      (B, L) int64, the document of each token where spec.reset, else absent; -1 where tokens are pad
        step_targets  () int64, the scored targets of this rank in all micro-batches of the step. A loss summed and
                      divided by its sum over the ranks depends on the global batch only.
    """

    def __init__(
        self, spec: StreamSpec, *, batch_sequences: int, accumulate: int, rank: int, world: int, start_step: int = 0
    ) -> None:
        _check_sizes(batch_sequences=batch_sequences, accumulate=accumulate, rank=rank, world=world)
        self.spec = spec
        self.batch_sequences = batch_sequences
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.start_step = start_step

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _this_worker()
        encoder = self.spec.encoder(warn=self.rank == 0 and worker == 0)  # one voice of many is enough
        step_samples = self.world * self.accumulate * self.batch_sequences  # G
        first = self.start_step * step_samples
        windows = enumerate(training_windows(self.spec, first), first)
        micro_batch = 0
        while True:
            mine = [(g, window) for g, window in islice(windows, step_samples) if g % self.world == self.rank]
            scored = torch.tensor(sum(self.spec.scored(window) for _, window in mine))
            for start in range(0, len(mine), self.batch_sequences):
                if micro_batch % workers == worker:
                    rows = mine[start : start + self.batch_sequences]
                    samples = [self.spec.sample(window, g, encoder) for g, window in rows]
                    batch = collate(samples, self.batch_sequences, self.spec.vocabulary)
                    yield {**batch, "step_targets": scored}
                micro_batch += 1


class EvaluationBatches(IterableDataset[Batch]):
    """One pass over the evaluation samples (see evaluation_windows): each in exactly one batch of one rank and worker.

    Every rank gets the same number of batches, as collectives need: rows without a sample are all pad and IGNORE.
    Batches are as in TrainingBatches, without ``step_targets``. Of a measured spec they hold beside
        bytes, words  () int64 each, what the scored tokens stand for (see documents.Extent)
    """

    def __init__(
        self, spec: StreamSpec, *, batch_sequences: int, rank: int, world: int, max_samples: int | None = None
    ) -> None:
        _check_sizes(batch_sequences=batch_sequences, accumulate=1, rank=rank, world=world)
        self.spec = spec
        self.batch_sequences = batch_sequences
        self.rank = rank
        self.world = world
        self.max_samples = max_samples

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _this_worker()
        encoder = self.spec.encoder()
        windows = enumerate(evaluation_windows(self.spec, self.max_samples))
        number = 0
        while rows := list(islice(windows, self.world * self.batch_sequences)):
            if number % workers == worker:
                mine = rows[self.rank :: self.world]
                samples = [self.spec.sample(window, g, encoder) for g, window in mine]
                batch = collate(samples, self.batch_sequences, self.spec.vocabulary)
                if self.spec.reset and not samples:
                    batch["segments"] = torch.full_like(batch["tokens"], -1)
                if self.spec.measured:
                    extents = [sample.extent for sample in samples if sample.extent is not None]
                    batch["bytes"] = torch.tensor(sum(extent.bytes for extent in extents))
                    batch["words"] = torch.tensor(sum(extent.words for extent in extents))
                yield batch
            number += 1


def collate(samples: Sequence[Sample], rows: int, vocabulary: Vocabulary = PROTEIN) -> Batch:
    """Tensors "tokens" and "targets", and "segments" where samples have them, (rows, longest sample) int64.

    Padded with the vocabulary's pad, IGNORE and -1. Rows beyond the samples are filler; without any sample they are one
    token long.
    """
    length = max((len(sample.tokens) for sample in samples), default=1)
    batch = {"tokens": torch.full((rows, length), vocabulary.pad), "targets": torch.full((rows, length), IGNORE)}
    if any(sample.segments is not None for sample in samples):
        batch["segments"] = torch.full((rows, length), -1)
    for row, sample in enumerate(samples):
        for name, into in batch.items():
            values = getattr(sample, name)
            # a copy, as a sample may be a view of read-only bytes
            into[row, : len(values)] = torch.from_numpy(values.astype(np.int64))
    return batch


class Loader:
    """The batches of ``dataset``, prepared by ``workers`` background processes (0: by this one), in the same order.

    A DataLoader whose workers hand on a DataError as it is: torch glues the worker's traceback to the message of an
    exception. Here the worker sends the sentence as an item, and the exception is raised in this process. There is no
    length: Lightning iterates until the end, or max_steps.
    """

    def __init__(self, dataset: IterableDataset[Batch], workers: int, pin_memory: bool = False) -> None:
        self.dataset = dataset
        self.workers = workers
        self.pin_memory = pin_memory

    def __iter__(self) -> Iterator[Batch]:
        items = DataLoader(
            _Messages(self.dataset),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            collate_fn=_as_is,
        )
        for item in items:
            if isinstance(item, _Failure):
                raise DataError(item.sentence)
            yield item


@dataclass(frozen=True)
class _Failure:
    sentence: str


class _Messages(IterableDataset["Batch | _Failure"]):
    """The items of a dataset; a DataError becomes the last item."""

    def __init__(self, dataset: IterableDataset[Batch]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Batch | _Failure]:
        try:
            yield from self.dataset
        except DataError as error:
            yield _Failure(str(error))


def _as_is(item: Item) -> Item:
    return item


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _check_sizes(*, batch_sequences: int, accumulate: int, rank: int, world: int) -> None:
    if min(batch_sequences, accumulate, world) < 1 or not 0 <= rank < world:
        raise ValueError(
            f"need batch_sequences, accumulate, world >= 1 and 0 <= rank < world, "
            f"not {batch_sequences}, {accumulate}, {world} and rank {rank}"
        )
