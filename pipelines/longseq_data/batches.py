"""Batches of the endless order: which rank and which worker gets which sample.

A rank takes its samples by their number in the global order, so the samples of an optimiser step do not depend on how
many ranks, workers or micro-batches share the work, and a resume needs nothing but the number of samples consumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .errors import DataError
from .os_errors import explained
from .parcels import Parcel, pack, unpack
from .sharing import Arrays, MakeBatch, Samples, Share

Batch = dict[str, Tensor]
Item = TypeVar("Item")


class TrainingBatches(IterableDataset[Batch]):
    """Endless micro-batches of one rank, from the step that begins with sample number ``start`` on.

    A step takes the next G = world · accumulate · batch_sequences samples of the global order (with packing "bucket" as
    many as its tokens allow: see CorpusSpec). Sample g belongs to rank g mod world; the samples of a rank, in ascending
    order, form ``accumulate`` micro-batches. Worker w of W yields every W-th micro-batch, which is the order in which a
    DataLoader asks for them.

    Each batch holds, with B = batch_sequences and L the longest sample of the micro-batch:
        tokens        (B, L) int64, the vocabulary's pad after the end of a sample
        targets       (B, L) int64, IGNORE where nothing is scored
        segments      (B, L) int64, the document of each token where spec.reset, else absent; -1 where tokens are pad
        step_targets  () int64, the scored targets of this rank in all micro-batches of the step. A loss summed and
                      divided by its sum over the ranks depends on the global batch only.
        samples       () int64, consumed by all ranks together once the step is done: ``start`` of what comes after it
    """

    def __init__(
        self, spec: Samples, *, batch_sequences: int, accumulate: int, rank: int, world: int, start: int = 0
    ) -> None:
        self.spec = spec
        self.share = Share(batch_sequences, accumulate, rank, world)
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        return map(unpack, map(pack, self.arrays()))

    def arrays(self) -> Iterator[Arrays]:
        """The batches of this worker as NumPy arrays."""
        worker, _ = _this_worker()
        one_voice = self.share.rank == 0 and worker == 0  # of many is enough to warn
        return _of_this_worker(self.spec.training(self.start, self.share, one_voice))


class EvaluationBatches(IterableDataset[Batch]):
    """One pass over the evaluation samples (see streaming.evaluation_windows): each in exactly one batch of one rank
    and worker.

    Every rank gets the same number of batches, as collectives need: rows without a sample are all pad and IGNORE.
    Batches are as in TrainingBatches, without ``step_targets`` and ``samples``. Of a measured spec they hold beside
        bytes, words  () int64 each, what the scored tokens stand for (see documents.Extent)
    """

    def __init__(
        self, spec: Samples, *, batch_sequences: int, rank: int, world: int, max_samples: int | None = None
    ) -> None:
        self.spec = spec
        self.share = Share(batch_sequences, 1, rank, world)
        self.max_samples = max_samples

    def __iter__(self) -> Iterator[Batch]:
        return map(unpack, map(pack, self.arrays()))

    def arrays(self) -> Iterator[Arrays]:
        """The batches of this worker as NumPy arrays."""
        return _of_this_worker(self.spec.evaluation(self.share, self.max_samples))


def _of_this_worker(batches: Iterator[MakeBatch]) -> Iterator[Arrays]:
    worker, workers = _this_worker()
    for number, make in enumerate(batches):
        if number % workers == worker:
            yield make()


class Loader:
    """The batches of ``dataset``, prepared by ``workers`` background processes (0: by this one), in the same order.

    A DataLoader whose workers hand on a DataError, and an OSError's sentence, as it is: torch glues the worker's
    traceback to the message of an exception. Here the worker sends the sentence as an item, and the exception is raised
    in this process. Batches cross the border between processes in small types, which costs a quarter of the time, and
    become int64 here, in pinned memory where ``pin_memory`` asks for it. There is no length: Lightning iterates until
    the end, or max_steps.

    prefetch: batches that each worker prepares ahead. persistent: workers stay for the next pass.
    """

    def __init__(
        self,
        dataset: TrainingBatches | EvaluationBatches,
        workers: int,
        pin_memory: bool = False,
        prefetch: int = 4,
        persistent: bool = False,
    ) -> None:
        self.dataset = dataset
        self.pin_memory = pin_memory
        messages = _Messages(dataset)
        # in this process a DataLoader does nothing but take its time
        self._items: Iterable[Parcel | _Failure] = (
            messages
            if not workers
            else DataLoader(
                messages,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch,
                persistent_workers=persistent,
                collate_fn=_as_is,
            )
        )

    def __iter__(self) -> Iterator[Batch]:
        for item in self._items:
            if isinstance(item, _Failure):
                raise DataError(item.sentence)
            yield unpack(item, self.pin_memory)


@dataclass(frozen=True)
class _Failure:
    sentence: str


class _Messages(IterableDataset["Parcel | _Failure"]):
    """The batches of a dataset, packed; a DataError, or an OSError in a sentence, becomes the last item."""

    def __init__(self, dataset: TrainingBatches | EvaluationBatches) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Parcel | _Failure]:
        try:
            yield from map(pack, self.dataset.arrays())
        except DataError as error:
            yield _Failure(str(error))
        except OSError as error:
            yield _Failure(f"{explained(error, what='the data cannot be read')}.")


def _as_is(item: Item) -> Item:
    return item


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
