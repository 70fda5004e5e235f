"""The moment between two optimiser steps, after the validation that belongs to it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from longseq.training.callbacks.steps import ends_step


class StepBoundary(pl.Callback):
    """Calls :meth:`on_step_boundary` once after every optimiser step, and after its validation where one is due.

    A checkpoint taken there leaves nothing of the step undone, so a resumed run neither skips nor repeats.
    """

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        """``step`` optimiser steps are done."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and not _validation_follows(trainer, batch_idx):
            self.on_step_boundary(trainer, task, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.on_step_boundary(trainer, task, trainer.global_step)


def _validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    every = trainer.val_check_batch
    return bool(trainer.limit_val_batches) and every is not None and (batch_idx + 1) % every == 0
