"""The optimiser, and the learning rate over the steps."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from longseq.config.schema import Config
from longseq.config.training import OptimConfig
from longseq.errors import ConfigError
from longseq.models.layers import Block
from longseq.training.muon import MuonAdamW
from longseq.training.optimizer_state import holder_of
from longseq.training.schedule import learning_rate_share
from longseq.training.transfer import Rates


def build_optimizer(model: nn.Module, config: OptimConfig, dim: int) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only; or Muon for the matrices of the blocks, and
    AdamW for the others. Muon must be bound (:func:`bind`) before its first step.

    torch's is its fused one, on CUDA and on the CPU: a single pass without temporaries, which over the long tensors
    that ZeRO makes of many short ones cost a quarter of a small model's step on the CPU.

    dim: the model's width, which rates depend on with optim.base_dim.

    Raises:
        ConfigError: if one of DeepSpeed's cannot be compiled here.
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices: dict[nn.Parameter, int] = {}
    if config.name == "muon":
        matrices = {p: maps for m in model.modules() if isinstance(m, Block) for p, maps in m.matrices().items()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in matrices:
            (decayed if parameter.ndim == 2 and parameter not in embeddings else plain).append(parameter)
    *own, of_decayed, of_plain = Rates.of(config, dim).groups(config)
    groups: list[dict[str, Any]] = [{"params": decayed, **of_decayed}, {"params": plain, **of_plain}]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.betas[0], config.betas[1]), "eps": config.eps}
    if config.implementation == "torch":
        optimizer: AdamW
        if config.name == "muon":
            hidden = {"params": list(matrices), **own[0], "momentum": config.momentum}
            others = [{**group, "muon": False} for group in groups]
            optimizer = MuonAdamW([{**hidden, "muon": True}, *others], matrices, **settings)
        else:
            optimizer = AdamW(groups, fused=True, **settings)
        # It would unscale fp16's gradients in its step; they are clipped before, so the loss scaler does it.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if config.implementation == "cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return FusedAdam(groups, adam_w_mode=True, **settings)
    except (RuntimeError, OSError, ImportError, AssertionError) as error:
        raise ConfigError(
            f"optim.implementation={config.implementation} cannot be compiled here "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0]}): take optim.implementation=torch."
        ) from error


def bind(module: nn.Module, optimizer: Any) -> None:
    """Tell Muon where its matrices are, under DeepSpeed's wrapper or without. All ranks call it before a training."""
    holder = holder_of(module, optimizer)
    if isinstance(holder.base, MuonAdamW):
        holder.base.bind(holder.places())


def build_schedule(optimizer: Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Linear warm-up, then the schedule, as a function of the optimiser step."""
    return LambdaLR(optimizer, lambda step: learning_rate_share(step, config, max_steps))


def follow_config(optimizer: Any, schedule: Any, config: Config, step: int) -> None:
    """Give an optimiser that was restored from a checkpoint the configuration's settings, as of ``step``."""
    optim = config.optim
    share = learning_rate_share(step, optim, config.trainer.max_steps)
    peaks = Rates.of(optim, config.performer_spec(vocabulary=2).dim).groups(optim)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        if group.get("muon"):
            group["momentum"] = optim.momentum
        group.update(
            betas=tuple(optim.betas), eps=optim.eps, initial_lr=peak["lr"], **{**peak, "lr": peak["lr"] * share}
        )
    schedule.base_lrs = [peak["lr"] for peak in peaks]
