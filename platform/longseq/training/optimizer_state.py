"""Master weights and moments by parameter name, whatever holds them: DeepSpeed at any stage, or a plain optimiser.

A *piece* is a run of one parameter's elements that this rank holds: views of the fp32 master weights, and of AdamW's
two moments or Muon's one. A checkpoint stores pieces under the parameter's name and their place in it, so that another
number of ranks, another stage or another strategy finds what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longseq.training.muon import MOMENTUM, MuonAdamW, Place

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter; every tensor is a flat view of where it lives."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # "fp32", "exp_avg", "exp_avg_sq"; of Muon's matrices "fp32", "momentum_buffer"

    @property
    def numel(self) -> int:
        return self.tensors[MASTER].numel()


class Holder(Protocol):
    """Where the optimiser's state lives."""

    base: Any  # the optimiser that makes the step: torch's, ours or one of DeepSpeed's
    replicated: bool  # whether every rank holds everything

    def places(self) -> Iterator[Place]:
        """Where all parameters are, the same ones in the same order on all ranks."""

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds. Moments that no step has made yet are made, and zero."""

    def refresh(self) -> None:
        """Bring the weights that the model computes with up to date with the master weights. All ranks call it."""


def holder_of(module: nn.Module, optimizer: Any) -> Holder:
    """The state of ``module``'s optimiser: DeepSpeed's wrapper or the optimiser itself."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _Zero3(optimizer, names)
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        return _Partitioned(optimizer, names)
    if kind in ("FP16_UnfusedOptimizer", "FP16_Optimizer"):
        return _Half(optimizer, names)
    return _Plain(optimizer, names)


def optimizer_step(holder: Holder) -> int:
    """How many steps Adam has made: it corrects the moments' bias by that.

    DeepSpeed's FusedAdam counts in the last tensor of each group alone.
    """
    return max((int(state["step"]) for state in holder.base.state.values() if "step" in state), default=0)


def set_optimizer_step(holder: Holder, step: int) -> None:
    """Give every state of Adam its count of steps, in the type it has."""
    for state in holder.base.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step


def loss_scale(optimizer: Any) -> dict[str, float]:
    """The state of DeepSpeed's loss scaler; empty where there is none."""
    scaler = _scaler(optimizer)
    return {name: getattr(scaler, name) for name in _SCALER_STATE if getattr(scaler, name, None) is not None}


def set_loss_scale(optimizer: Any, state: dict[str, float]) -> None:
    scaler = _scaler(optimizer)
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


# What moves; window and factor are the configuration's.
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(optimizer: Any) -> Any:
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _moments(base: Any, parameter: Tensor) -> tuple[str, ...]:
    return (MOMENTUM,) if isinstance(base, MuonAdamW) and parameter in base.matrices else MOMENTS


def _state_of(base: Any, master: Tensor, moments: tuple[str, ...] = MOMENTS) -> dict[str, Any]:
    """The optimiser's state of one tensor, as its first step would make it where there is none yet."""
    state = base.state[master]
    if not all(name in state for name in moments):
        # torch's fused Adam counts steps in a tensor where its weights are, DeepSpeed's Adams in a number.
        torchs = isinstance(base, torch.optim.AdamW)
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if torchs else 0
        for name in moments:
            state[name] = torch.zeros_like(master, memory_format=torch.preserve_format)
    return state


class _Holding:
    """What all holders have in common."""

    base: Any
    names: dict[int, str]

    def places(self) -> Iterator[Place]:
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        for place in self.places():
            if not place.numel:
                continue
            moments = _moments(self.base, place.parameter)
            state = _state_of(self.base, place.master, moments)
            tensors = {MASTER: place.master, **{name: state[name] for name in moments}}
            here = place.offset, place.numel
            views = {kind: tensor.detach().view(-1).narrow(0, *here) for kind, tensor in tensors.items()}
            yield Piece(self.names[id(place.parameter)], place.start, views)


class _Plain(_Holding):
    """The optimiser over the model's own fp32 weights: strategies single and ddp, and DeepSpeed's stage 0 in fp32."""

    replicated = True

    def __init__(self, optimizer: Any, names: dict[int, str]):
        self.base, self.names = optimizer, names

    def places(self) -> Iterator[Place]:
        for group in self.base.param_groups:
            for parameter in group["params"]:
                yield Place(parameter, parameter.shape, 0, parameter.numel(), parameter, 0)

    def refresh(self) -> None:
        pass


class _Half(_Holding):
    """Half precision at stage 0: fp32 copies of all weights on every rank, one by one or (FusedAdam) in a row."""

    replicated = True

    def __init__(self, optimizer: Any, names: dict[int, str]):
        self.optimizer, self.base, self.names = optimizer, optimizer.optimizer, names

    def refresh(self) -> None:
        for place in self.places():
            master = place.master.detach().view(-1).narrow(0, place.offset, place.numel)
            place.parameter.data.copy_(master.view(place.shape))

    def places(self) -> Iterator[Place]:
        flat = hasattr(self.optimizer, "fp32_groups_flat")
        for index, weights in enumerate(self.optimizer.fp16_groups):
            offsets = _offsets(weights) if flat else [0] * len(weights)
            in_a_row = self.optimizer.fp32_groups_flat[index] if flat else None
            masters = [in_a_row] * len(weights) if flat else self.optimizer.fp32_groups[index]
            for weight, master, offset in zip(weights, masters, offsets, strict=True):
                yield Place(weight, weight.shape, 0, weight.numel(), master, offset)


class _Partitioned(_Holding):
    """Stages 1 and 2: each group's weights in a row, cut into as many equal partitions as there are ranks."""

    replicated = False

    def __init__(self, optimizer: Any, names: dict[int, str]):
        self.optimizer, self.base, self.names = optimizer, optimizer.optimizer, names

    def places(self) -> Iterator[Place]:
        import torch.distributed as dist

        zero = self.optimizer
        if hasattr(zero, "round_robin_bit16_groups"):
            groups, offsets = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
            partitions = zero.single_partition_of_fp32_groups
        else:  # BF16_Optimizer
            groups, offsets = zero.bf16_groups, [_offsets(group) for group in zero.bf16_groups]
            partitions = zero.fp32_groups_flat_partition
        for index, (group, places, partition) in enumerate(zip(groups, offsets, partitions, strict=True)):
            size, ranks = partition.numel(), zero.real_dp_process_group[index]
            first = dist.get_rank(group=ranks) * size
            for parameter, place in zip(group, places, strict=True):
                begin, end = max(place, first), min(place + parameter.numel(), first + size)
                offset, start = (begin - first, begin - place) if begin < end else (0, 0)
                yield Place(parameter, parameter.shape, start, max(0, end - begin), partition, offset, ranks)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class _Zero3(_Holding):
    """Stage 3: every parameter cut into as many equal partitions as there are ranks, the last ones padded."""

    replicated = False

    def __init__(self, optimizer: Any, names: dict[int, str]):
        self.optimizer, self.base, self.names = optimizer, optimizer.optimizer, names

    def places(self) -> Iterator[Place]:
        import torch.distributed as dist

        zero = self.optimizer
        for index, group in enumerate(zero.fp16_groups):
            with self._in_memory(index):
                master, offset = zero.fp32_partitioned_groups_flat[index], 0
                for parameter in group:
                    share = parameter.partition_numel()
                    ranks = parameter.ds_process_group
                    start = dist.get_rank(group=ranks) * share
                    real = max(0, min(share, parameter.ds_numel - start))
                    yield Place(parameter, parameter.ds_shape, start if real else 0, real, master, offset, ranks)
                    offset += share

    def refresh(self) -> None:
        zero = self.optimizer
        zero.checkpoint_event_prologue()
        for index in range(len(zero.fp16_groups)):
            with self._in_memory(index):
                zero._reassign_or_swap_out_partitioned_parameters(index)
        zero.checkpoint_event_epilogue()

    @contextmanager
    def _in_memory(self, index: int) -> Iterator[None]:
        """A sub-group's state is read from NVMe where it is offloaded to there, and written back."""
        zero = self.optimizer
        on_disk = zero._swappable_optimizer_subgroup(index)
        if on_disk:
            zero._optimizer_states_and_gradient_swap_in(index)
        yield
        if on_disk:
            zero._optimizer_states_and_gradient_swap_out(index)


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins when they lie in a row."""
    return list(accumulate((tensor.numel() for tensor in tensors), initial=0))[:-1]
