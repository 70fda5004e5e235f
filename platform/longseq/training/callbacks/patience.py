"""Early stopping: when the validation loss has not fallen for a while."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np

from longseq.config.schema import Config
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq.training.task import LanguageModelling


class Patience(pl.Callback):
    """Settles the task after ``finetune.patience`` validations in a row whose loss is not below the lowest before.

    The losses of earlier starts are those of the curves, which are fp32. Before Checkpointing, after Curves.
    """

    def __init__(self, run: Run, config: Config):
        self.run, self.patience = run, config.finetune.patience
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        curves = read_curves(self.run.tensorboard_dir) if trainer.global_step else {}
        before = curves.get("valid/loss", {})
        self.losses = [before[step] for step in sorted(before) if step <= trainer.global_step]

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        assert isinstance(task, LanguageModelling)
        assert task.validated is not None
        self.losses.append(float(np.float32(task.validated[1])))
        task.settled = validations_since_best(self.losses) >= self.patience


def validations_since_best(losses: list[float]) -> int:
    """How many came after the first of the lowest loss; NaN is never the lowest."""
    lowest = [np.inf if np.isnan(loss) else loss for loss in losses]
    return len(losses) - 1 - int(np.argmin(lowest))
