"""Distributions of the weights and of their gradients."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longseq.config.schema import Config
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import due, ends_step
from longseq.training.tensorboard import flush, writer


class Histograms(pl.Callback):
    """Every ``trainer.histogram_every`` steps, each parameter's weights and gradients as the step found them."""

    def __init__(self, config: Config, curves: Curves):
        self.every, self.curves = config.trainer.histogram_every, curves
        self.last_of_step = False

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.last_of_step = ends_step(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: Optimizer) -> None:
        step = trainer.global_step + 1
        if not (self.last_of_step and due(step, self.every)):
            return
        with self.curves.paused():
            for name, parameter in task.named_parameters():
                # Every rank asks for both: shards are put together by collectives.
                pieces = {"weights": full_weight(parameter), "gradients": full_gradient(parameter)}
                for kind, values in pieces.items():
                    if trainer.is_global_zero and values is not None and bool(values.isfinite().all()):
                        writer(trainer).add_histogram(f"{kind}/{name.removeprefix('model.')}", values, step)
            flush(trainer)


def full_weight(parameter: nn.Parameter) -> Tensor:
    """A copy on the CPU, in fp32, out of all ranks' shards."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().cpu().clone()
    return parameter.detach().float().cpu()


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The same of the gradient between backward pass and optimiser step, before clipping; None where there is none.

    With a loss scale it is still multiplied by that.
    """
    if any(hasattr(parameter, mark) for mark in ("ds_id", "_hp_mapping", "_hp_grad")):  # DeepSpeed keeps it
        from deepspeed.utils import safe_get_full_grad

        own, parameter.grad = parameter.grad, None  # what this rank has, which need not be averaged
        gradient = safe_get_full_grad(parameter)
        parameter.grad = own
        gradient = own if gradient is None else gradient
    else:
        gradient = parameter.grad
    return None if gradient is None else gradient.detach().to("cpu", torch.float32)
