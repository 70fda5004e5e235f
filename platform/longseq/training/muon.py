"""Muon for hidden matrices, AdamW for all other weights, wherever ZeRO keeps them.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes each step of a matrix orthogonal. torch.optim.Muon
and DeepSpeed's see one matrix a parameter; here q, k and v are one parameter, and so are SwiGLU's two maps: each is
made orthogonal by itself. ZeRO flattens weights and cuts them anywhere, and a flattened row is no matrix: here a rank
puts its elements of a matrix together with those of the others, and takes its own of the result.

    m ← μ m + (1 − μ) g,   u = μ m + (1 − μ) g,   W ← (1 − η λ) W − 0.2 η √max(rows, columns) · orthogonal(u)

The factor gives a step the size of AdamW's, so that one rate serves both (Liu et al. 2025, arXiv 2502.16982, eq. 4).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

MOMENTUM = "momentum_buffer"
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # the authors'


@dataclass(frozen=True, eq=False)
class Place:
    """Where elements [start, start + numel) of a flattened parameter live on this rank; numel may be 0."""

    parameter: nn.Parameter
    shape: torch.Size  # of all of it
    start: int
    numel: int
    master: Tensor  # fp32 weights that the optimiser steps, of several parameters in a row perhaps
    offset: int  # in it
    group: Any = None  # the ranks that the parameter is cut among; None: it is not


def orthogonal(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Matrices (..., rows, columns) with singular values near 1, between 0.7 and 1.2 or so, in the place of their own.

    By the authors' five Newton-Schulz iterations, in ``dtype``: bf16 on GPUs, and fp32 on CPUs, which gain nothing by
    less.
    """
    a, b, c = _COEFFICIENTS
    y = x.to(dtype or (torch.float32 if x.device.type == "cpu" else torch.bfloat16))
    turned = y.shape[-2] > y.shape[-1]
    y = y.mT if turned else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if turned else y).to(x.dtype)


@dataclass(frozen=True, eq=False)
class _Slot:
    """One parameter's elements [start, start + numel) in a master tensor of this rank, from ``offset`` on."""

    shape: torch.Size
    maps: int  # on top of each other
    offset: int
    start: int
    numel: int
    group: Any  # of the ranks that have the others
    shared: bool  # whether some rank has a part of it

    def whole(self, own: Tensor) -> Tensor:
        """All of it, of what each rank has; all ranks of the group call it where it is shared."""
        if self.shared:
            everything = own.new_zeros(self.shape.numel())
            everything[self.start : self.start + self.numel] = own
            dist.all_reduce(everything, group=self.group)
            own = everything
        return own.view(self.maps, -1, self.shape[1])


class MuonAdamW(AdamW):
    """torch's fused AdamW, and in the groups with ``muon=True`` Muon.

    Args:
        groups: of parameters, as of torch's optimisers. Muon's have ``momentum`` besides.
        matrices: Muon's parameters, each with the number of linear maps that it holds on top of each other.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], matrices: Mapping[nn.Parameter, int], **settings: Any):
        super().__init__(groups, fused=True, **settings)
        self.matrices = dict(matrices)
        self._slots: dict[Tensor, list[_Slot]] = {}

    def bind(self, places: Iterable[Place]) -> None:
        """Learn where the matrices are. All ranks call it, before the first step."""
        found: dict[Tensor, list[Place]] = defaultdict(list)
        for place in places:
            if place.parameter in self.matrices:
                found[place.master].append(place)
        self._slots = {}
        for master, here in found.items():
            parts = torch.tensor([0 < p.numel < p.shape.numel() for p in here], dtype=torch.int32, device=master.device)
            if here[0].group is not None:
                dist.all_reduce(parts, op=dist.ReduceOp.MAX, group=here[0].group)
            self._slots[master] = [
                _Slot(p.shape, self.matrices[p.parameter], p.offset, p.start, p.numel, p.group, bool(cut))
                for p, cut in zip(here, parts.tolist(), strict=True)
            ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for master in group["params"] if group["muon"] else ():
                if master.grad is not None:
                    self._step_of(master, master.grad, group)
        return loss

    def _step_of(self, master: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        slots = self._slots.get(master)
        if slots is None:
            if bool(gradient.any()):
                raise RuntimeError("Muon does not know which matrices these weights are: bind() was not called")
            return  # DeepSpeed steps once with zeros when it begins
        state, rate = self.state[master], float(group["lr"])
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(master, memory_format=torch.preserve_format)
        weights, grad, momentum = (x.detach().view(-1) for x in (master, gradient, state[MOMENTUM]))
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"])
        weights.mul_(1 - rate * group["weight_decay"])
        for slot in slots:
            if not (slot.numel or slot.shared):
                continue
            here = slice(slot.offset, slot.offset + slot.numel)
            maps = slot.whole(update[here])
            if slot.numel:
                step = orthogonal(maps).view(-1)[slot.start : slot.start + slot.numel]
                weights[here].add_(step, alpha=-0.2 * rate * math.sqrt(max(maps.shape[1:])))
