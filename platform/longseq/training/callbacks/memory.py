"""Memory of the training processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import ends_step
from longseq.training.collectives import all_max
from longseq.training.tensorboard import log_scalars


class Memory(pl.Callback):
    """With every point of the curves, the memory of the rank that uses most.

    On CUDA the most that was allocated since the last point, on the CPU the resident set now.
    """

    def __init__(self, curves: Curves):
        self.curves = curves

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (ends_step(trainer, batch_idx) and self.curves.due(trainer.global_step)):
            return
        used = torch.tensor(memory_used(task.device), dtype=torch.float64, device=task.device)
        log_scalars(trainer, "machine", {"memory_gib": float(all_max(used)) / 2**30}, trainer.global_step)


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
