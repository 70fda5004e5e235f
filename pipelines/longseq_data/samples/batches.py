"""Batches of the endless order: which rank and which worker gets which sample.

A rank takes its samples by their number in the global order, so the samples of an optimiser step do not depend on how
many ranks, workers or micro-batches share the work, and a resume needs nothing but the number of samples consumed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .background import Background
from .rank_share import Batches, Evaluation, Share, Training
from .rows import Arrays
from .transport import Parcel, pack

Batch = dict[str, Tensor]


class _Planned(IterableDataset[Batch]):
    """Batches that a plan says; spec and share are its own."""

    plan: Training | Evaluation

    def __iter__(self) -> Iterator[Batch]:
        return map(unpack, map(pack, self.arrays()))

    def arrays(self) -> Iterator[Arrays]:
        """The batches of this worker as NumPy arrays."""
        info = get_worker_info()
        return self.plan.arrays(*((info.id, info.num_workers) if info else (0, 1)))


class TrainingBatches(_Planned):
    """Endless micro-batches of one rank, from the step that begins with sample number ``start`` on.

    A step takes the next G = world · accumulate · batch_sequences samples of the global order (with packing "bucket" as
    many as its tokens allow: see CorpusSpec). Sample g belongs to rank g mod world; the samples of a rank, in ascending
    order, form ``accumulate`` micro-batches. Worker w of W yields every W-th micro-batch, which is the order in which a
    Loader, and a DataLoader of torch, asks for them.

    Each batch holds, with B = batch_sequences and L the longest sample of the micro-batch:
        tokens        (B, L) int64, the vocabulary's pad after the end of a sample
        targets       (B, L) int64, IGNORE where nothing is scored
        segments      (B, L) int64, the document of each token where spec.reset, else absent; -1 where tokens are pad
        step_targets  () int64, the scored targets of this rank in all micro-batches of the step. A loss summed and
                      divided by its sum over the ranks depends on the global batch only.
        samples       () int64, consumed by all ranks together once the step is done: ``start`` of what comes after it
    """

    def __init__(
        self, spec: Batches, *, batch_sequences: int, accumulate: int, rank: int, world: int, start: int = 0
    ) -> None:
        self.plan = Training(spec, Share(batch_sequences, accumulate, rank, world), start)


class EvaluationBatches(_Planned):
    """One pass over the evaluation samples (see streaming.evaluation_windows): each in exactly one batch of one rank
    and worker.

    Every rank gets the same number of batches, as collectives need: rows without a sample are all pad and IGNORE.
    Batches are as in TrainingBatches, without ``step_targets`` and ``samples``. Of a measured spec they hold besides
        bytes, words  () int64 each, what the scored tokens stand for (see documents.Extent)
    """

    def __init__(
        self, spec: Batches, *, batch_sequences: int, rank: int, world: int, max_samples: int | None = None
    ) -> None:
        self.plan = Evaluation(spec, Share(batch_sequences, 1, rank, world), max_samples)


class Loader:
    """The batches of ``dataset``, prepared by ``workers`` background processes (0: by this one), in the same order.

    The processes are started anew and not forked, need no torch, and pass over the stop signals that reach a whole job;
    they end with this one. A DataError of theirs is raised here as it is; RuntimeError says that one was killed.
    Batches cross the border between processes in small types, which costs a quarter of the time, and become int64 here,
    in pinned memory where ``pin_memory`` asks for it. There is no length: Lightning iterates until the end, or
    max_steps.

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
        self.workers = workers
        self.pin_memory = pin_memory
        self.prefetch = prefetch
        self.persistent = persistent
        self._kept: Background | None = None

    def __iter__(self) -> Iterator[Batch]:
        parcels = self._from_workers() if self.workers else map(pack, self.dataset.arrays())
        for parcel in parcels:
            yield unpack(parcel, self.pin_memory)

    def _from_workers(self) -> Iterator[Parcel]:
        background, self._kept = self._kept, None
        if background is None:
            background = Background(self.dataset.plan, self.workers, self.prefetch)
        try:
            yield from background.one_pass()
            if self.persistent:
                self._kept = background
        finally:
            if self._kept is not background:
                background.close()


def unpack(parcel: Parcel, pin_memory: bool = False, *, wide: bool = True) -> dict[str, Tensor]:
    """The batch as int64 tensors, or as they came, not ``wide``; ``pin_memory``: each contiguous, in memory that a GPU
    can fetch by itself."""
    batch = {name: torch.tensor(number) for name, number in parcel.numbers.items()}
    bases = [torch.from_numpy(base) for base in parcel.bases]
    if pin_memory:
        for name, view in parcel.views.items():
            batch[name] = torch.empty(view.shape, dtype=torch.int64, pin_memory=True).copy_(view.of(bases))
    else:
        bases = [base.long() for base in bases] if wide else bases
        batch.update({name: view.of(bases) for name, view in parcel.views.items()})
    return batch
