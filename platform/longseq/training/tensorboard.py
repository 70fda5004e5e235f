"""Writing to a run's TensorBoard stream, so that what is written survives a kill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl


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
