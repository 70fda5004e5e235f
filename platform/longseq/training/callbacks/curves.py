"""Curves in TensorBoard, and the line or bar a person watches."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import lightning.pytorch as pl
from tqdm import tqdm

from longseq.config.schema import Config
from longseq.label_data import batches_of
from longseq.runs.run import Run
from longseq.training.callbacks.gradients import GradientNorm, not_finite
from longseq.training.callbacks.steps import AfterSteps, due
from longseq.training.schedule import learning_rate_share
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars


class Curves(AfterSteps):
    """Every ``log_every`` steps: loss, perplexity, bits, accuracy, learning rate, gradient norm and tokens per second.

    All are means over the steps since the last point and over all ranks, weighted by target. Next to them is the
    epoch, the passes over a prepared corpus so far; of several sources, of each whose size is known, under data/epochs.
    """

    def __init__(self, run: Run, config: Config, gradient_norm: GradientNorm):
        self.run, self.config, self.gradient_norm = run, config, gradient_norm
        self.shown: dict[str, float] = {}
        self.epochs: Callable[[int], dict[str, float]] | None = None
        self.since = self.validation_began = time.monotonic()
        self.bar: _Bar | None = None  # before the training begins, and on other ranks

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.since = time.monotonic()
        self.epochs = batches_of(self.config, "train").epochs
        if trainer.is_global_zero:
            self.bar = _Bar(trainer.global_step, self.config)

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if self.due(step):
            assert isinstance(task, LanguageModelling)
            self._log_train(trainer, task, step)
        if self.bar:
            self.bar.update(step, self.shown, logged=self.due(step))

    def due(self, step: int) -> bool:
        """Whether the curves get a point after ``step``."""
        return due(step, self.config.trainer.log_every) or step == self.config.trainer.max_steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the training speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - began

    def on_validation_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.validation_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        assert isinstance(task, LanguageModelling)
        self.since += time.monotonic() - self.validation_began  # training speed is that of training
        curves = task.quality(task.valid_sums.take(task.device))
        task.validated = (trainer.global_step, curves["loss"])
        log_scalars(trainer, "valid", curves, trainer.global_step)
        for name, sums in task.source_sums.items():
            log_scalars(trainer, f"valid/{name}", task.quality(sums.take(task.device)), trainer.global_step)
        if self.bar:
            self.bar.say(f"step {trainer.global_step}  validation: {_line(curves)}")

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _log_train(self, trainer: pl.Trainer, task: LanguageModelling, step: int) -> None:
        sums = task.train_sums.take(task.device)
        now = time.monotonic()
        if not sums[2]:
            return  # every step since the last point was left out
        curves = task.quality(sums)
        norm = self.gradient_norm.value(trainer)
        if not (math.isfinite(curves["loss"]) and self.gradient_norm.finite(trainer)):
            raise not_finite(self.run, step)
        optim = self.config.optim
        curves["learning_rate"] = optim.lr * learning_rate_share(step - 1, optim, self.config.trainer.max_steps)
        if norm is not None and math.isfinite(norm):
            curves["gradient_norm"] = norm
        curves["tokens_per_second"] = sums[3].item() / (now - self.since)
        curves["padded_tokens_per_second"] = sums[4].item() / (now - self.since)
        epochs = self.epochs(task.samples) if self.epochs and trainer.is_global_zero else {}
        if "" in epochs:
            curves["epoch"] = epochs.pop("")
        self.since = now
        self.shown = curves
        log_scalars(trainer, "train", curves, step)
        if epochs:
            log_scalars(trainer, "data/epochs", epochs, step)

    def _close(self) -> None:
        if self.bar:
            self.bar.close()


class WithCurves(AfterSteps):
    """Calls :meth:`on_point` with every point of the curves."""

    def __init__(self, curves: Curves):
        self.curves = curves

    def on_point(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        """A point of the curves is due after ``step``. All ranks call it.

        Where all steps since the point before were left out, it has no losses.
        """
        raise NotImplementedError

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if self.curves.due(step):
            self.on_point(trainer, task, step)


def _line(curves: dict[str, float]) -> str:
    forms = {"loss": ".4f", "perplexity": ".2f", "accuracy": ".1%", "rmse": ".4g"}
    text = "  ".join(f"{name} {curves[name]:{form}}" for name, form in forms.items() if name in curves)
    if "tokens_per_second" in curves:
        text += f"  {curves['tokens_per_second']:,.0f} tokens/s"
    return text + _epoch(curves)


def _epoch(curves: dict[str, float]) -> str:
    return f"  epoch {curves['epoch']:.2f}" if "epoch" in curves else ""


class _Bar:
    """A progress bar on a terminal, a line every ``log_every`` steps elsewhere."""

    def __init__(self, step: int, config: Config):
        self.max_steps = config.trainer.max_steps
        self.began, self.first = time.monotonic(), step
        self.bar = None
        if sys.stderr.isatty():
            layout = "{l_bar}{bar}| step {n_fmt}/{total_fmt}, {remaining} left{postfix}"
            self.bar = tqdm(total=self.max_steps, initial=step, bar_format=layout, dynamic_ncols=True, leave=True)

    def update(self, step: int, curves: dict[str, float], logged: bool) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.update(step - self.bar.n)
                if curves and logged:
                    rate = f"{curves['tokens_per_second']:,.0f} tokens/s"
                    self.bar.set_postfix_str(f"loss {curves['loss']:.4f}, {rate}{_epoch(curves)}")
        elif curves and logged:
            left = (time.monotonic() - self.began) / max(1, step - self.first) * (self.max_steps - step)
            self.say(f"step {step}/{self.max_steps}  {_line(curves)}  {tqdm.format_interval(left)} left")

    def say(self, text: str) -> None:
        with suppress(OSError):  # a closed terminal is no reason to stop
            if self.bar is not None:
                self.bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
