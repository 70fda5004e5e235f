"""The ranks that hold slices of the same sequences, and what they tell each other.

A group is handed to :func:`longseq.attention.favor_attention`; :mod:`longseq.attention.context.parallel` says how
attention is computed over its slices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from longseq.attention.state import AttentionState

# PyTorch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What this rank has handed over so far: messages and their bytes."""

    gathers: int = 0  # all-gathers of states
    gathered: int = 0  # bytes of this rank's own states in them
    halo: int = 0  # bytes of keys, values and their gradients to single ranks
    other: int = 0  # documents' borders, a sign of life's byte, and of exact attention which keys are padding


@dataclass(eq=False)
class ContextGroup:
    """The ranks that hold slices of the same sequences, in the order of the slices. All slices are equally long.

    Attributes:
        group: their process group.
        traffic: counts what this rank sends.
    """

    group: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def gather(self, state: AttentionState) -> Callable[[], list[AttentionState]]:
        """Send one state to all, and go on; the result waits for those of all ranks."""
        message = torch.cat((state.sums.flatten(1), state.log_scale.flatten(1)), dim=1)  # (N, m · (e + 1) + 1)
        everyone = message.new_empty(self.size * len(message), message.shape[1])
        work = _all_gather(everyone, message, group=self.group, async_op=True)
        self.traffic.gathers += 1
        self.traffic.gathered += message.nbytes

        def wait() -> list[AttentionState]:
            work.wait()
            parts = everyone.view(self.size, *message.shape)
            return [AttentionState(_as(x[:, :-1], state.sums), _as(x[:, -1:], state.log_scale)) for x in parts]

        return wait

    def total(self, state: AttentionState) -> Callable[[], AttentionState]:
        """The merged state of all ranks."""
        states = self.gather(state)
        return lambda: functools.reduce(AttentionState.merge, states())

    def gather_rows(self, x: Tensor) -> Tensor:
        """x (...) of every rank: (P, ...)."""
        everyone = x.new_empty(self.size * x.numel())
        _all_gather(everyone, x.contiguous().flatten(), group=self.group)
        self.traffic.other += x.nbytes
        return everyone.view(self.size, *x.shape)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; all ranks call it."""
        return bool(self.gather_rows(torch.tensor([flag], dtype=torch.uint8)).any())

    def documents(self, segments: Tensor) -> SlicedDocuments:
        """Where the documents of a packed slice go on: segments (B, n) of this rank's. All ranks call it."""
        size = segments.shape[1]
        first, last = segments[:, :1], segments[:, -1:]
        head = (segments == first).long().cumprod(1).sum(1)
        tail = (segments == last).flip(1).long().cumprod(1).sum(1)
        facts = torch.stack((first[:, 0].long(), last[:, 0].long(), head, tail))
        firsts, lasts, heads, tails = self.gather_rows(facts).unbind(1)  # (P, B) each
        before, after = torch.zeros_like(heads), torch.zeros_like(heads)
        for rank in range(1, self.size):
            reach = tails[rank - 1] + before[rank - 1] * (tails[rank - 1] == size)
            before[rank] = reach * (firsts[rank] == lasts[rank - 1])
        for rank in reversed(range(self.size - 1)):
            reach = heads[rank + 1] + after[rank + 1] * (heads[rank + 1] == size)
            after[rank] = reach * (lasts[rank] == firsts[rank + 1])
        return SlicedDocuments(segments, before, after)


@dataclass(frozen=True, eq=False)
class SlicedDocuments:
    """The documents of a slice, and how far they reach into other slices.

    Attributes:
        segments: (B, n) integers of this rank's slice; a run of equal numbers is a document.
        before: (P, B) how many positions of the document that each slice begins in lie before the slice.
        after: (P, B) how many of the document that it ends in lie behind it.
    """

    segments: Tensor
    before: Tensor
    after: Tensor


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous().view(like.shape)
