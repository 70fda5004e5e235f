"""When and where in the training loop callbacks act."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from longseq.config.schema import Config


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimiser has just stepped: micro-batch ``batch_idx`` was the last one that it adds up."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class AfterSteps(pl.Callback):
    """Calls :meth:`on_step` after every optimiser step, before the validation that may follow it."""

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        """``step`` optimiser steps are done."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            self.on_step(trainer, task, trainer.global_step)


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) happens after ``step``."""
    return bool(every) and step % every == 0


def sharded_weights(config: Config) -> bool:
    """Whether a forward pass needs every rank: no rank has all weights."""
    return config.trainer.strategy == "deepspeed" and config.trainer.zero_stage == 3
