"""Values of this moment next to the curves: the loss scale, and the memory of the training processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from longseq.training.callbacks.curves import WithCurves
from longseq.training.collectives import all_max
from longseq.training.tensorboard import log_scalars


class Gauges(WithCurves):
    """What the loss is multiplied by in fp16, so that its gradients do not vanish; and the memory of the rank that uses
    most: on CUDA the most that was allocated since the last point, on the CPU the resident set now.
    """

    def on_point(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        scale = loss_scale(trainer)
        if scale is not None:
            log_scalars(trainer, "train", {"loss_scale": scale}, step)
        used = torch.tensor(memory_used(task.device), dtype=torch.float64, device=task.device)
        log_scalars(trainer, "machine", {"memory_gib": float(all_max(used)) / 2**30}, step)


def loss_scale(trainer: pl.Trainer) -> float | None:
    """DeepSpeed's or torch's, or None where the precision needs none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    engine: Any = trainer.strategy.model
    if hasattr(engine, "fp16_enabled") and engine.fp16_enabled():
        return float(engine.optimizer.loss_scale)
    return None


def memory_used(device: torch.device) -> int:
    """Bytes: allocated on the GPU at the most since this was last asked, or resident in this process."""
    used = memory_so_far(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return used


def memory_so_far(device: torch.device) -> int:
    """The same, without beginning anew."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
