"""Sums and agreements over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from longseq.attention import ContextGroup

# What hangs is ended by the watchdog, which knows who is to blame: a collective's own limit would only be in its way.
PATIENCE = timedelta(days=7)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; the tensor itself where there is one process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """The largest over all ranks, in place; the tensor itself where there is one process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def context_group(parts: int) -> ContextGroup:
    """This rank's group of ``parts`` neighbours. All ranks call it."""
    mine = None
    for first in range(0, dist.get_world_size(), parts):
        ranks = list(range(first, first + parts))
        group = dist.new_group(ranks, timeout=PATIENCE)
        if dist.get_rank() in ranks:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return ContextGroup(mine)


class ControlGroup:
    """A gloo group for decisions the ranks take together, so that asking never waits for a GPU. All ranks make it.

    There is one however many are made: each costs a rank a connection to every other rank.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            assert dist.group.WORLD is not None
            self._group = _gloo(dist.group.WORLD)

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: true on every rank if it is true on one."""
        if self._group is None:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(vote) for vote in votes.tolist()]

    def gather(self, value: str | None) -> list[str | None]:
        """Every rank's value, by rank."""
        if self._group is None:
            return [value]
        values: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def table(self, row: Sequence[float]) -> list[list[float]]:
        """Every rank's row of numbers, by rank."""
        mine = torch.tensor(row, dtype=torch.float64)
        if self._group is None:
            return [mine.tolist()]
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(rows, mine, group=self._group)
        return [each.tolist() for each in rows]

    def barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def group_of_its_own() -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for a thread of each; None for one process. All ranks call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _gloo(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The processes of ``world`` over gloo: itself, where it is that."""
    return world if dist.get_backend(world) == "gloo" else _over_gloo(world)


@cache
def _over_gloo(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """One for each world."""
    group = group_of_its_own()
    assert group is not None
    return group
