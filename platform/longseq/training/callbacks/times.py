"""Where the time goes: waiting for data, training steps, checkpoints."""

from __future__ import annotations

import time
from contextlib import suppress

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler

from longseq.errors import SupersededError
from longseq.training.callbacks.curves import Curves, WithCurves
from longseq.training.tensorboard import log_scalars
from longseq.training.vitals import Vitals


class Clock(Profiler):
    """Adds up the seconds of what Lightning's loop says it is doing, and passes it on as a sign of life."""

    def __init__(self, vitals: Vitals | None = None) -> None:
        super().__init__()
        self.vitals = vitals or Vitals()
        self.seconds = dict.fromkeys(("data", "step", "checkpoint", "forward", "write", "benchmark"), 0.0)
        self.saved = False
        self._concerns: dict[str, str | None] = {}
        self._began: dict[str, float] = {}
        self._spans: list[list[torch.cuda.Event]] = []  # of forward passes on a GPU, which go on after their call

    def start(self, action_name: str) -> None:
        self.vitals.at(action_name)
        concern = self._concern(action_name)
        if concern == "step":
            self.vitals.begin_batch()
        elif concern == "data":
            self.vitals.in_data = True
        elif concern == "forward" and torch.cuda.is_initialized():
            self._spans.append([_now()])
        self._began[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        concern, began = self._concern(action_name), self._began.pop(action_name, None)
        self.vitals.mark += 1
        if concern == "step":
            self.vitals.end_batch()
        elif concern == "data":
            self.vitals.in_data = False
        elif concern == "forward" and self._spans:
            self._spans[-1].append(_now())
        if concern and began is not None:
            self.seconds[concern] += time.perf_counter() - began
        if action_name == "save_checkpoint":
            self.saved = True

    def _concern(self, action: str) -> str | None:
        if action not in self._concerns:
            self._concerns[action] = _concern(action)
        return self._concerns[action]

    def own(self, concern: str) -> float:
        """Seconds of something that this rank does by itself since they were last taken, by the clock of its device."""
        if concern == "forward" and self._spans:
            ended = [span for span in self._spans if len(span) == 2 and span[1].query()]
            return sum(first.elapsed_time(last) for first, last in ended) / 1e3
        return self.seconds[concern]

    def take(self) -> tuple[dict[str, float], bool]:
        """Seconds since this was last asked, and whether a checkpoint was saved in them."""
        seconds, saved = self.seconds, self.saved
        self.seconds, self.saved = dict.fromkeys(seconds, 0.0), False
        self._spans.clear()
        return seconds, saved


def _concern(action: str) -> str | None:
    if action.endswith(".train_dataloader_next"):
        return "data"
    if action == "run_training_batch":
        return "step"
    if action in ("forward", "write", "benchmark"):  # as our own code says it
        return action
    # The callback with all that it does around the file: copies, checksums, waiting for other ranks.
    return "checkpoint" if action.startswith("[Callback]Checkpointing.") else None


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Times(WithCurves):
    """Milliseconds per step that rank 0 waited for data and that it trained, and the seconds that checkpoints and
    benchmarks took.

    With every point of the curves. It belongs behind the checkpoints among the callbacks, and reads ``clock``, which is
    the trainer's profiler.
    """

    def __init__(self, curves: Curves, clock: Clock):
        super().__init__(curves)
        self.clock = clock
        self.since: int | None = None

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.clock.take()
        self.since = trainer.global_step

    def on_point(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        self._log(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._log(trainer, trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        if trainer.logger is not None and self.since is not None:
            with suppress(OSError, SupersededError):  # perhaps the very reason, which is known
                self._log(trainer, trainer.global_step)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        seconds, saved = self.clock.take()
        assert self.since is not None
        points = {}
        if step > self.since:
            points = {f"{name}_ms": seconds[name] / (step - self.since) * 1e3 for name in ("data", "step")}
        if saved:
            points["checkpoint_seconds"] = seconds["checkpoint"]
        if seconds["benchmark"]:
            points["benchmark_seconds"] = seconds["benchmark"]
        self.since = step
        log_scalars(trainer, "time", points, step)
