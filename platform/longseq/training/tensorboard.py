"""Writing to a run's TensorBoard stream, so that what is written survives a kill."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from longseq import starts
from longseq.errors import SupersededError
from longseq.run import Run


class RunLogger(TensorBoardLogger):
    """A run's one event stream, written by its newest start alone."""

    def __init__(self, run: Run, start: int):
        # A resumed run hides the points after its checkpoint, of step ``start``, that the interrupted one still wrote.
        super().__init__(run.path, name="", version="tensorboard", purge_step=start + 1)
        self._run, self._checked = run, -math.inf
        threading.excepthook = _excepthook

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What every point, picture and text goes through.

        Raises:
            SupersededError: if a newer start has the run, at most that many seconds after it took it.
        """
        # The thread of `starts.watch` ends a process whose run another one has; a look at each point would cost a
        # listing of a network's folder each.
        if time.monotonic() - self._checked >= starts.POLL_SECONDS:
            self._run.check_start()
            self._checked = time.monotonic()
        return super().experiment

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the stream; after a failure as well as it can be: the disk may be full."""
        try:
            super().finalize(status)
        except (OSError, SupersededError):
            if status == "success":
                raise

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One point in each curve. An ``OSError`` of an earlier point comes out here, as what it is: Lightning's own
        method calls every failure an unsupported value."""
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)


def _excepthook(failed: threading.ExceptHookArgs, /) -> None:
    """No traceback of TensorBoard's writing thread: its error is raised again where the next point is written."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def writer(trainer: pl.Trainer) -> Any:
    """The ``SummaryWriter`` of rank 0; elsewhere something that takes every call and does nothing."""
    assert trainer.logger is not None
    return trainer.logger.experiment  # type: ignore[attr-defined]


def log_scalars(trainer: pl.Trainer, prefix: str, values: Mapping[str, float], step: int) -> None:
    """One point in each of the curves ``prefix/name``, flushed."""
    assert trainer.logger is not None
    trainer.logger.log_metrics({f"{prefix}/{name}": value for name, value in values.items()}, step)
    flush(trainer)


def flush(trainer: pl.Trainer) -> None:
    """Hand everything over to the operating system: a kill then loses no point."""
    if trainer.is_global_zero:
        writer(trainer).flush()
