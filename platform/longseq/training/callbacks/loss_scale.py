"""What the loss is multiplied by in fp16, so that its gradients do not vanish."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import ends_step
from longseq.training.tensorboard import log_scalars


class LossScale(pl.Callback):
    """With every point of the curves, where there is a loss scale."""

    def __init__(self, curves: Curves):
        self.curves = curves

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (ends_step(trainer, batch_idx) and self.curves.due(trainer.global_step)):
            return
        scale = loss_scale(trainer)
        if scale is not None:
            log_scalars(trainer, "train", {"loss_scale": scale}, trainer.global_step)


def loss_scale(trainer: pl.Trainer) -> float | None:
    """DeepSpeed's or torch's, or None where the precision needs none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    engine: Any = trainer.strategy.model
    if hasattr(engine, "fp16_enabled") and engine.fp16_enabled():
        return float(engine.optimizer.loss_scale)
    return None
