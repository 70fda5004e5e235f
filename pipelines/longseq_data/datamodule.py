"""The data as Lightning wants it: loaders that know their rank."""

from __future__ import annotations

import lightning

from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.samples.rank_share import Batches


class SequenceDataModule(lightning.LightningDataModule):
    """Training batches from sample ``start`` on, and a validation pass over at most ``valid_samples`` samples.

    train, valid: a StreamSpec, a CorpusSpec or LabelledSamples.
    batch_sequences: sequences per rank and micro-batch; with packing "bucket" those of a validation.
    start: samples that all ranks have consumed; the last trained batch says it in "samples".
    accumulate: micro-batches per optimiser step, as in the Trainer.
    workers: processes per rank that prepare training batches; 0 works in the training process.
    context_parallel: so many neighbouring ranks get the same batches, to take a slice each (see slices.sliced).
    """

    def __init__(
        self,
        train: Batches,
        valid: Batches | None,
        *,
        batch_sequences: int,
        accumulate: int = 1,
        workers: int = 0,
        start: int = 0,
        valid_samples: int | None = None,
        context_parallel: int = 1,
    ) -> None:
        super().__init__()
        self.train = train
        self.valid = valid
        self.batch_sequences = batch_sequences
        self.accumulate = accumulate
        self.workers = workers
        self.start = start
        self.valid_samples = valid_samples
        self.context_parallel = context_parallel

    def train_dataloader(self) -> Loader:
        rank, world = self._place()
        self.train.begin()
        batches = TrainingBatches(
            self.train,
            batch_sequences=self.batch_sequences,
            accumulate=self.accumulate,
            rank=rank,
            world=world,
            start=self.start,
        )
        return Loader(batches, self.workers, self._on_gpu())

    def val_dataloader(self) -> Loader | list[Loader]:
        if self.valid is None:
            return []
        rank, world = self._place()
        self.valid.begin()
        batches = EvaluationBatches(
            self.valid, batch_sequences=self.batch_sequences, rank=rank, world=world, max_samples=self.valid_samples
        )
        # every worker parses the whole file, so a second one would gain nothing in a short pass
        return Loader(batches, min(self.workers, 1), self._on_gpu(), persistent=True)

    def _place(self) -> tuple[int, int]:
        """Which of how many that share the samples."""
        if self.trainer is None:
            raise RuntimeError("SequenceDataModule needs its Trainer to know its rank: pass it to Trainer.fit.")
        parts = self.context_parallel
        return self.trainer.global_rank // parts, self.trainer.world_size // parts

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
