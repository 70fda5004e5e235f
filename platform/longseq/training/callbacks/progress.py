"""Where the training is, for `longseq jobs` and `longseq status`: one small file, renewed after steps."""

from __future__ import annotations

import math
import queue
import threading
import time
from contextlib import suppress

import lightning.pytorch as pl

from longseq.config.schema import Config
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import AfterSteps

_LAST_WORDS_SECONDS = 5.0  # for the last step, when the training ends
# From one renewal to the next: a thirtieth of a second per rank, so that small jobs note every step, and large ones ask
# a file system that many share for less; at most so long.
_EACH_RANK_SECONDS, _MOST_SECONDS = 1 / 30, 10.0


class Progress(AfterSteps):
    """A job script also goes by it: two crashes after the same step are one too many.

    A thread writes: where the file system stands still the training goes on, and later steps take the place of those
    that were not written, as they do where steps follow each other faster than a large job writes them.
    """

    def __init__(self, run: Run, config: Config, curves: Curves):
        self.run, self.config, self.curves = run, config, curves
        self.latest: queue.SimpleQueue[starts.Progress | None] = queue.SimpleQueue()
        self.writing: threading.Thread | None = None
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if self.run.start and trainer.is_global_zero:
            self.seconds = min(_MOST_SECONDS, trainer.world_size * _EACH_RANK_SECONDS)
            self.writing = threading.Thread(target=self._write, name="progress", daemon=True)
            self.writing.start()
            self._note(trainer)

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        self._note(trainer)

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        self._end()

    def _note(self, trainer: pl.Trainer) -> None:
        if self.writing is None:
            return
        shown = self.curves.shown
        self.latest.put(
            starts.Progress(
                step=trainer.global_step,
                last_step=self.config.trainer.max_steps,
                loss=shown.get("loss", math.nan),
                tokens_per_second=shown.get("tokens_per_second", math.nan),
                time=time.time(),
            )
        )

    def _end(self) -> None:
        if self.writing is not None:
            self.latest.put(None)
            self.writing.join(_LAST_WORDS_SECONDS)
            self.writing = None

    def _write(self) -> None:
        due, ended = 0.0, False
        while not ended:
            waiting = [self.latest.get()]
            while None not in waiting:
                left = due - time.monotonic()
                try:
                    waiting.append(self.latest.get(timeout=max(left, 0.0)))
                except queue.Empty:
                    if left <= 0:
                        break
            ended = None in waiting
            noted = [progress for progress in waiting if progress is not None]
            if noted:
                with suppress(OSError):  # for people: no reason to stop
                    starts.note_progress(self.run.starts_dir, self.run.start, noted[-1])
                due = time.monotonic() + self.seconds
