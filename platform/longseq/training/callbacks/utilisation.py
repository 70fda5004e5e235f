"""How much of the devices' peak the training uses."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from longseq.config.schema import Config
from longseq.measure.model_flops import training_flops
from longseq.measure.timing import Gemm
from longseq.training.callbacks.curves import Curves, WithCurves
from longseq.training.collectives import all_sum
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Large enough for a device's full rate, and a fraction of a second on either.
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


class Utilisation(WithCurves):
    """Model FLOPs of a step and a second, and their share of the devices' peak (MFU).

    The peak is ``trainer.peak_tflops``, or the rate of a matrix product that all ranks measure together at the start,
    in the precision of training: processes that share cores share their peak.
    """

    def __init__(self, config: Config, curves: Curves):
        super().__init__(curves)
        self.config = config
        self.peak = 0.0  # FLOP/s of all ranks together
        self.length = self.tokens = 0  # of the last batch, padding included

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        given = self.config.trainer.peak_tflops
        if given is not None:
            self.peak = given * 1e12 * trainer.world_size
            return
        with self.curves.paused():
            rate = gemm_rate(task.device, _DTYPE[self.config.trainer.precision])
            self.peak = float(all_sum(torch.tensor(rate, dtype=torch.float64, device=task.device)))

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        parts = self.config.trainer.context_parallel
        self.length, self.tokens = batch["tokens"].shape[1] * parts, batch["tokens"].numel()

    def on_point(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        assert isinstance(task, LanguageModelling)
        if "padded_tokens_per_second" not in self.curves.shown:
            return  # every step so far was left out
        per_token = training_flops(task.model.spec, self.length)
        tokens = self.tokens * trainer.accumulate_grad_batches * trainer.world_size
        rate = per_token * self.curves.shown["padded_tokens_per_second"]
        points = {
            "model_tflops_per_step": per_token * tokens / 1e12,
            "model_tflops_per_second": rate / 1e12,
            "mfu": rate / self.peak,
        }
        log_scalars(trainer, "machine", points, step)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of three, all processes at it at the same time."""
    with torch.random.fork_rng():  # its random matrices are no part of the run
        gemm = Gemm(_GEMM_SIZE[device.type], dtype, device)
    if dist.is_initialized():
        dist.barrier()
    for _ in range(3):
        gemm.measure()
    return max(gemm.rates)
