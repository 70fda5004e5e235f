"""The norm of the whole gradient, and what to do when it or the loss is not finite."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from longseq.config import Config
from longseq.errors import LongseqError
from longseq.run import Run


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

    def finite(self, trainer: pl.Trainer) -> bool:
        """Whether the last gradient could be used."""
        norm = self.value(trainer)
        return norm is None or self.may_overflow or math.isfinite(norm)


def not_finite(run: Run, step: int) -> LongseqError:
    """What to say when the loss or its gradient is NaN or infinite."""
    newest, _ = run.newest_checkpoint()
    good = f"the last good checkpoint is {newest.path}" if newest else "there is no checkpoint yet"
    return LongseqError(
        f"{run.path}: the loss or its gradient is not finite at step {step}; {good}. Go on with a lower rate, e.g. "
        f"`{run.resume_command} optim.lr=...`, or a lower optim.clip."
    )
