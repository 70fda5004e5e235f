"""Where in the training loop an optimiser step ends."""

from __future__ import annotations

import lightning.pytorch as pl


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimiser has just stepped: micro-batch ``batch_idx`` was the last one that it adds up."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) happens after ``step``."""
    return bool(every) and step % every == 0
