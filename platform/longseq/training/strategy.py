"""Lightning's strategies as we use them: DeepSpeed on CUDA (NCCL) and on the CPU (gloo) by the same code, DDP, single.

All of them save and load through :class:`~longseq.training.snapshots.Snapshots`.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from longseq.config.schema import Config
from longseq.devices import on_cuda, own_device
from longseq.models.layers import Block
from longseq.training.collectives import PATIENCE
from longseq.training.deepspeed_settings import deepspeed_settings
from longseq.training.snapshots import Snapshots


def build_strategy(config: Config) -> Strategy:
    """The strategy a configuration asks for. Call it before anything else touches DeepSpeed."""
    if config.trainer.strategy == "single":
        return SavingSingleStrategy(own_device(config))
    if config.trainer.strategy == "ddp":
        return SavingDDPStrategy(process_group_backend="nccl" if on_cuda(config) else "gloo", timeout=PATIENCE)
    return _deepspeed_strategy(config)


def _deepspeed_strategy(config: Config) -> DeepSpeedStrategy:
    settings = deepspeed_settings(config, on_cuda=on_cuda(config))
    if on_cuda(config):
        _import_without_compiler()
        return CleanDeepSpeedStrategy(config=settings, logging_level=logging.WARNING, timeout=PATIENCE)
    os.environ["DS_ACCELERATOR"] = "cpu"
    _import_without_compiler()
    return CPUDeepSpeedStrategy(
        config=settings, logging_level=logging.WARNING, process_group_backend="gloo", timeout=PATIENCE
    )


def _import_without_compiler() -> None:
    """Import the module of an optimiser that is not used here, and that every ZeRO stage asks for.

    Its functions are decorated with ``torch.compile``, which would load all of torch's inductor: a fifth of the CPU
    time that the start of a process takes.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:  # another DeepSpeed
        pass
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class GivenPlaces(LightningEnvironment):
    """The ranks that ``launch`` has given, also inside a SLURM job. Lightning would reckon with the devices it sees."""

    def set_global_rank(self, rank: int) -> None:
        super().set_global_rank(int(os.environ.get("RANK", rank)))

    def set_world_size(self, size: int) -> None:
        super().set_world_size(int(os.environ.get("WORLD_SIZE", size)))


class SavingSingleStrategy(Snapshots, SingleDeviceStrategy):
    """One process."""


class SavingDDPStrategy(Snapshots, DDPStrategy):
    """PyTorch's data parallelism: every rank holds everything."""


class CleanDeepSpeedStrategy(Snapshots, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with an optimiser that has made no step yet."""

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRScheduler | None = None
    ) -> Any:
        if self.zero_stage_3:
            _gather_whole_blocks(model)
        engine, sharded_optimizer = self._initialize(model, optimizer, lr_scheduler)
        # Half precision without ZeRO steps once with zero gradients to allocate the moments, which counts in Adam's
        # bias correction: the first real step would be a quarter too short.
        for state in optimizer.state.values() if optimizer else ():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()
            elif "step" in state:
                state["step"] = 0
        return engine, sharded_optimizer

    def _optimizer(self) -> Any:
        return self.deepspeed_engine.optimizer

    def _sharded_weights(self) -> bool:
        return self.zero_stage_3

    def _count(self, step: int, accumulate: int) -> None:
        engine = self.deepspeed_engine
        engine.global_steps, engine.micro_steps = step, step * accumulate
        engine.global_samples = step * engine.train_batch_size()

    def _initialize(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRScheduler | None
    ) -> tuple[Any, Any]:
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)


def _gather_whole_blocks(model: nn.Module) -> None:
    """Let ZeRO-3 gather the weights of a block at once where its parts compute in tiles of the sequence.

    Tiles take and return the gradients of several modules together, so all their weights must be there together.
    """
    from deepspeed.utils import set_z3_leaf_modules

    if any(isinstance(module, Block) and module.tile for module in model.modules()):
        set_z3_leaf_modules(model, [Block])


class CPUDeepSpeedStrategy(CleanDeepSpeedStrategy):
    """The same without Lightning's refusal of CPUs.

    DeepSpeed itself runs every ZeRO stage over gloo; Lightning only checks for a CUDA device and hands over device
    indices, which a CPU does not have.
    """

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()  # past the check for CUDA

    def setup_distributed(self) -> None:
        import deepspeed

        # A shared-memory all-reduce for inference, which training never calls: compiling it would cost the first run
        # most of a minute and a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _initialize(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRScheduler | None
    ) -> tuple[Any, Any]:
        import deepspeed

        engine, sharded_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, sharded_optimizer
