"""Steps that must not be trained on: a loss or gradient that is not finite, or a loss far above the ones before."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from longseq.config.schema import Config
from longseq.errors import DivergedError
from longseq.runs.run import Run
from longseq.training.callbacks.gradients import GradientNorm, not_finite
from longseq.training.callbacks.layer_watch import LayerWatch
from longseq.training.callbacks.steps import AfterSteps
from longseq.training.collectives import ControlGroup, all_sum
from longseq.training.task import LanguageModelling

# A mean over about fifty batches, and none to compare with before twenty.
_MEMORY, _LEAST = 0.98, 20
_MOST_IN_A_ROW = 20


class BadSteps(AfterSteps):
    """Looks at every step before the next begins, and stops the run or leaves the step out.

    A bad loss is made NaN before the backward pass: so are all gradients then, and no optimiser takes such a step.
    DeepSpeed leaves it out by itself, for plain AdamW the gradients are taken away. The norm of the whole gradient,
    which is the same on all ranks, tells of all other cases.
    """

    def __init__(
        self, run: Run, config: Config, gradient_norm: GradientNorm, finish_writing: Callable[[], None]
    ) -> None:
        self.run, self.gradient_norm = run, gradient_norm
        self.finish_writing = finish_writing  # before the last good checkpoint is named
        self.skip = config.trainer.on_bad_step == "skip"
        self.factor = config.trainer.spike_factor
        self.plain, self.clip = gradient_norm.ours, config.optim.clip
        self.mean, self.count, self.in_a_row = 0.0, 0, 0
        self.spike: float | None = None  # the loss that made this step a spike

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        assert isinstance(task, LanguageModelling)
        self.control = ControlGroup()
        self.watch = LayerWatch(task.model)
        if self.skip or self.factor:
            task.judge_loss = self._judge

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: Optimizer) -> None:
        if self.plain and self.skip and not self.gradient_norm.usable(trainer):
            for parameter in task.parameters():
                parameter.grad = None
            self._clip(trainer, 0.0)  # DeepSpeed's own clipping does not bear that there are none

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if self.plain and self.skip:
            self._clip(trainer, self.clip)
        spike, bad = self.spike, not self.gradient_norm.usable(trainer)
        self.spike = None
        self.in_a_row = self.in_a_row + 1 if bad or spike is not None else 0
        if self.in_a_row and not (self.skip and self.in_a_row < _MOST_IN_A_ROW):
            self.finish_writing()
            if spike is not None and math.isfinite(spike):
                raise self._spiked(step, spike)
            raise not_finite(self.run, step, self._where(), self.in_a_row)
        if self.in_a_row and trainer.is_global_zero:
            what = f"its loss of {spike:.4g}" if spike is not None else "its gradient, which is not finite"
            print(f"longseq: warning: step {step} is left out for {what}.", file=sys.stderr, flush=True)
        self.watch.begin()

    def _judge(self, loss_sum: Tensor, targets: Tensor) -> tuple[float, bool]:
        """The factor for the loss of a batch: 1, or NaN where the step must not be taken. All ranks call it.

        The curves show a spike; a mean with NaN in it would show nothing.
        """
        total, count = all_sum(torch.stack([loss_sum.detach().double(), targets.double()])).tolist()
        loss = total / max(count, 1)
        spiked = bool(self.factor) and self.count >= _LEAST and loss > self.factor * self.mean
        if spiked or not math.isfinite(loss):
            self.spike = loss
            return math.nan, math.isfinite(loss)
        self.count += 1
        weight = max(1 - _MEMORY, 1 / self.count)
        self.mean += weight * (loss - self.mean)
        return 1.0, True

    def _clip(self, trainer: pl.Trainer, norm: float) -> None:
        engine: Any = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            engine._config.gradient_clipping = norm

    def _where(self) -> str | None:
        """The first layer with a value that is not finite, of all ranks."""
        found = [where for where in self.control.gather(self.watch.first()) if where is not None]
        return min(found).partition(" ")[2] if found else None

    def _spiked(self, step: int, loss: float) -> DivergedError:
        newest = self.run.last_good()
        good = f"the last good checkpoint is {newest.path}" if newest else "there is no checkpoint yet"
        return DivergedError(
            f"{self.run.path}: the loss of step {step} is {loss:.4g}, more than trainer.spike_factor={self.factor:g} "
            f"times the mean of those before ({self.mean:.4g}); the step was not taken; {good}. Go on without such "
            f"steps (`{self.run.resume_command} trainer.on_bad_step=skip`), with a higher factor, or a lower rate."
        )
