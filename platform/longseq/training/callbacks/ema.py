"""A running mean of the weights over the steps: often a better model than the weights of any one step.

After each step, mean ← d · mean + (1 − d) · weights in fp32, d = min(trainer.ema_decay, (1 + step) / (10 + step)): the
first steps' weights fade quickly. Every checkpoint has the whole mean as ``ema.safetensors``, whatever the ranks and
the ZeRO stage, so a run goes on with any number of them.

Where each rank has all weights (ZeRO 0 to 2, DDP), rank 0 keeps the mean; of ZeRO-3's shards each rank keeps its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longseq.config.schema import Config
from longseq.runs.checkpoint import Checkpoint
from longseq.training.callbacks.steps import AfterSteps
from longseq.training.snapshots import FILES
from longseq.training.task import LanguageModelling

FILE = "ema.safetensors"


class WeightAverage(AfterSteps):
    """Keeps the mean and hands it to every checkpoint. It belongs before the checkpoints among the callbacks."""

    def __init__(self, config: Config, start: Checkpoint | None):
        self.decay, self.start = config.trainer.ema_decay, start
        self.means: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        assert isinstance(task, LanguageModelling)
        path = self.start.path / FILE if self.start else None
        saved = _read(path) if path and path.is_file() else {}  # none: the mean begins here
        for name, parameter in task.model.named_parameters():
            if not (trainer.is_global_zero or _sharded(parameter)):
                continue
            self.means[name] = _own(parameter).float().clone()
            if name in saved:
                self.means[name].copy_(_part(saved[name], parameter))

    @torch.no_grad()
    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if not self.means:
            return
        assert isinstance(task, LanguageModelling)
        weights = [_own(parameter).to(self.means[name]) for name, parameter in task.model.named_parameters()]
        torch._foreach_lerp_(list(self.means.values()), weights, 1 - decay_at(self.decay, step))

    def on_save_checkpoint(self, trainer: pl.Trainer, task: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(task, LanguageModelling)
        whole = {}
        for name, parameter in task.model.named_parameters():
            if trainer.is_global_zero or _sharded(parameter):
                whole[name] = _put_together(self.means[name], parameter).to("cpu", copy=True)
        persistent = task.model.state_dict().keys()  # constants of a kernel: part of a model, and no weights
        for name, buffer in task.model.named_buffers():
            if name in persistent:
                whole[name] = buffer.to("cpu", copy=True)
        checkpoint.setdefault(FILES, {})[FILE] = whole


def decay_at(decay: float, step: int) -> float:
    """How much of the mean is kept after optimiser step ``step``, counted from 1."""
    return min(decay, (1 + step) / (10 + step))


def _sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def _own(parameter: nn.Parameter) -> Tensor:
    """What this rank has of a parameter: all of it, or its shard (flat, padded at the end)."""
    return parameter.ds_tensor.detach() if _sharded(parameter) else parameter.detach()  # type: ignore[attr-defined]


def _part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """What of a whole tensor this rank keeps."""
    if not _sharded(parameter):
        return whole
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = whole.flatten()
    padded = torch.cat((flat, flat.new_zeros(size * dist.get_world_size() - flat.numel())))
    return padded[size * dist.get_rank() :][:size]


def _put_together(mean: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole mean of a parameter, out of all ranks' shards."""
    if not _sharded(parameter):
        return mean
    shards = [torch.empty_like(mean) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, mean)
    shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
    return torch.cat(shards)[: shape.numel()].view(shape)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
