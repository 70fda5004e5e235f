"""Writing to a run's TensorBoard stream, so that what is written survives a kill."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from longseq.errors import SupersededError
from longseq.runs.event_files import drop_after
from longseq.runs.run import Run
from longseq_data.os_errors import explained


class RunLogger(TensorBoardLogger):
    """A run's one event stream, written by its newest start alone."""

    def __init__(self, run: Run, start: int):
        # By this a TensorBoard that is open hides what it has read of the steps after the checkpoint.
        super().__init__(run.path, name="", version="tensorboard", purge_step=start + 1)
        self._run, self._start = run, start
        threading.excepthook = _excepthook

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What every point, picture and text goes through.

        Raises:
            SupersededError: if a newer start has the run when this one's first point is written. Later `starts.watch`
                ends this process: a look at each point would cost a listing of a network's folder.
        """
        if self._experiment is None:
            self._run.check_start()
            self._forget()
        return super().experiment

    def _forget(self) -> None:
        try:
            drop_after(self._run.tensorboard_dir, self._start)
        except OSError as error:  # the curves are as good; TensorBoard warns of what it hides
            what = f"points after step {self._start} stay in it"
            print(f"longseq: warning: {explained(error, what=what)}", file=sys.stderr, flush=True)

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
    for logger in trainer.loggers:
        logger.log_metrics({f"{prefix}/{name}": value for name, value in values.items()}, step)
    flush(trainer)


def flush(trainer: pl.Trainer) -> None:
    """Hand everything over to the operating system: a kill then loses no point."""
    if trainer.is_global_zero:
        writer(trainer).flush()
