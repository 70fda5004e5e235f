"""The norm of the whole gradient, and what to do when it or the loss is not finite."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from longseq.config.schema import Config
from longseq.errors import DivergedError
from longseq.runs.run import Run


class GradientNorm(pl.Callback):
    """Knows the norm of the last step's gradient, before clipping.

    DeepSpeed keeps the norm of gradients that it shards or scales; of plain ones (ZeRO-0 in fp32) it keeps none, and
    with fp16 and ZeRO-0 it keeps that of gradients still multiplied by the loss scale, which is no use.
    """

    def __init__(self, config: Config):
        settings = config.trainer
        unsharded = settings.strategy == "deepspeed" and settings.zero_stage == 0
        self.ours = settings.strategy != "deepspeed" or (unsharded and settings.precision == "fp32")
        self.unknown = unsharded and settings.precision == "fp16"
        # fp16 finds its loss scale by overflowing: DeepSpeed skips such a step, and nothing is wrong.
        self.may_overflow = settings.precision == "fp16"
        self.skips = settings.on_bad_step == "skip"
        self.plain = 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: Optimizer) -> None:
        if self.ours:
            self.plain = float(get_total_norm([p.grad for p in task.parameters() if p.grad is not None]))

    def value(self, trainer: pl.Trainer) -> float | None:
        """The norm, or None where it is not known."""
        if self.ours or self.unknown:
            return self.plain if self.ours else None
        engine: Any = trainer.strategy.model  # DeepSpeed's
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def usable(self, trainer: pl.Trainer) -> bool:
        """Whether the last gradient was, or would have been, a step to take."""
        norm = self.value(trainer)
        # DeepSpeed also says -1 for a norm that is no number.
        return norm is None or self.may_overflow or (math.isfinite(norm) and norm >= 0)

    def finite(self, trainer: pl.Trainer) -> bool:
        """Whether there is nothing to stop the run for."""
        return self.skips or self.usable(trainer)


def not_finite(run: Run, step: int, where: str | None = None, in_a_row: int = 1) -> DivergedError:
    """What to say when the loss or its gradient is NaN or infinite.

    where: the first layer where it was.
    """
    newest = run.last_good()
    what = f"the first such value is in {where}; " if where else ""
    what += f"it is the {in_a_row}th such step in a row; " if in_a_row > 1 else ""
    good = f"the last good checkpoint is {newest.path}" if newest else "there is no checkpoint yet"
    return DivergedError(
        f"{run.path}: the loss or its gradient is not finite at step {step}; {what}{good}. Go on with a lower rate, "
        f"e.g. `{run.resume_command} optim.lr=...`, or a lower optim.clip."
    )
