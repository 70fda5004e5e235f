"""Where the training is, for `longseq jobs` and `longseq status`: one small file, renewed at every step."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl

from longseq.config.schema import Config
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import ends_step


class Progress(pl.Callback):
    """A job script also goes by it: two crashes after the same step are one too many."""

    def __init__(self, run: Run, config: Config, curves: Curves):
        self.run, self.config, self.curves = run, config, curves

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._note(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            self._note(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        if not self.run.start or not trainer.is_global_zero:
            return
        shown = self.curves.shown
        progress = starts.Progress(
            step=trainer.global_step,
            last_step=self.config.trainer.max_steps,
            loss=shown.get("loss", math.nan),
            tokens_per_second=shown.get("tokens_per_second", math.nan),
            time=time.time(),
        )
        with suppress(OSError):  # for people: no reason to stop
            starts.note_progress(self.run.starts_dir, self.run.start, progress)
