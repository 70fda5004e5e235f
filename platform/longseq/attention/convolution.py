"""A short depthwise convolution along the length, on queries, keys and values before they are compared.

    y_t = Σ_k w_k ⊙ x_{t − left + k},   0 ≤ k < width

Causal: left = width − 1. Bidirectional: left = ⌊width / 2⌋, so an odd width is centred and an even one sees one more
position before than behind. Positions of other documents, hidden ones and those beyond the sequence count as zeros. At
the beginning w is the identity. (Fu et al. 2023, arXiv 2212.14052; Allen-Zhu 2025, "Canon layers".)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention.context.group import ContextGroup, SlicedDocuments
from longseq.attention.context.halo import neighbourhood
from longseq.attention.first_order import Saved, first_order
from longseq.attention.scan import Rows


class ShortConvolution(nn.Module):
    """(B, L, C) to (B, L, C), each channel by itself.

    Args:
        channels: C.
        width: how many positions a result is made of.
        causal: none of them is a later one.
    """

    def __init__(self, channels: int, width: int, causal: bool):
        super().__init__()
        self.width, self.left = width, width - 1 if causal else width // 2
        self.right = width - 1 - self.left
        identity = torch.zeros(channels, 1, width)  # as of nn.Conv1d
        identity[..., self.left] = 1.0
        self.weight = nn.Parameter(identity)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        segments: Tensor | SlicedDocuments | None = None,
        context: ContextGroup | None = None,
    ) -> Tensor:
        """The convolution of whole rows, or with ``context`` of this rank's slices of them.

        Args:
            x: (B, L, C).
            padding: (B, L) bool, True where a position is real, or None.
            segments: (B, L) integers; runs of equal numbers are documents that do not mix, or None.
        """
        if padding is not None:
            x = x.masked_fill(~padding[..., None], 0.0)
        documents = segments if isinstance(segments, SlicedDocuments) else None
        numbers = documents.segments if documents else segments
        runs = None if numbers is None else _runs(numbers)  # type: ignore[arg-type]
        length, first = x.shape[1], 0
        if context is not None:
            rows = Rows(q=x[..., :0], k=x, v=x[..., :0], runs=runs)
            near = neighbourhood(context, rows, documents, self.left, self.right).rows
            x, runs, first = near.k, near.runs, self.left
        return self._of(x, runs, first, length)

    def inside(self, x: Tensor, beside: tuple[int, int]) -> Tensor:
        """The convolution of x (B, L, C) without so many positions at its beginning and end, which are read alone."""
        before, behind = beside
        return self._of(x, None, before, x.shape[1] - before - behind)

    def following(self, x: Tensor, before: Tensor | None, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The causal convolution of the next positions x (B, n, C), and what the ones after them need.

        Args:
            before: (B, width − 1, C), the positions before x as this function returned them; None: x is the beginning.
            padding: (B, n) bool, True where a position is real, or None.
        """
        if padding is not None:
            x = x.masked_fill(~padding[..., None], 0.0)
        length = x.shape[1]
        if before is None:
            before = x.new_zeros(len(x), self.left, x.shape[2])
        x = torch.cat((before, x), dim=1)
        # A copy: a view would keep all of x in memory.
        return self._of(x, None, self.left, length), x[:, length:].clone()

    def _of(self, x: Tensor, runs: Tensor | None, first: int, length: int) -> Tensor:
        if torch.compiler.is_compiling():
            return _sum(x, self.weight, runs, first, length, self.left).to(x.dtype)
        out: Tensor = _Convolution.apply(x, self.weight, runs, first, length, self.left)
        return out


def _runs(segments: Tensor) -> Tensor:
    """(B, L) to the number of each position's document in its row, from 0."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).cumsum(1)


def _taps(rows: int, first: int, length: int, left: int, width: int) -> Iterator[tuple[int, slice, slice]]:
    """For each tap the positions that it reads, of those that are there, and those of the result that it adds to.

    The result begins at position ``first`` of x's ``rows``; beyond them there are zeros.
    """
    for tap in range(width):
        start = first - left + tap
        read = slice(max(start, 0), min(start + length, rows))
        if read.start < read.stop:
            yield tap, read, slice(read.start - start, read.stop - start)


def _of_one_document(x: Tensor, runs: Tensor | None, read: slice, to: slice, first: int) -> Tensor:
    """x (B, n, C), zeros where a tap reads another document than it adds to."""
    if runs is None:
        return x
    other = runs[:, read] != runs[:, to.start + first : to.stop + first]
    return x.masked_fill(other[..., None], 0.0)


def _sum(x: Tensor, weight: Tensor, runs: Tensor | None, first: int, length: int, left: int) -> Tensor:
    """(B, length, C), in fp32 or wider. Each position by itself: what others hold changes none of its bits."""
    taps = weight[:, 0].mT.to(torch.promote_types(x.dtype, torch.float32))  # (K, C)
    out = x[:, first : first + length] * taps[left]
    for tap, read, to in _taps(x.shape[1], first, length, left, len(taps)):
        if tap != left:
            out[:, to].addcmul_(_of_one_document(x[:, read], runs, read, to, first), taps[tap])
    return out


class _Convolution(torch.autograd.Function):
    """Written out because autograd would keep a copy of x for each tap where rows hold documents."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, runs: Tensor | None, first: int, length: int, left: int) -> Tensor:
        ctx.save_for_backward(x, weight, runs)
        ctx.place = first, length, left
        return _sum(x, weight, runs, first, length, left).to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, runs = saved
        first, length, left = ctx.place
        wide = torch.promote_types(x.dtype, torch.float32)
        taps, grad = weight[:, 0].mT.to(wide), grad.to(wide)
        dx, d_taps = torch.zeros_like(x, dtype=wide), torch.zeros_like(taps)
        for tap, read, to in _taps(x.shape[1], first, length, left, len(taps)):
            d_part = _of_one_document(grad[:, to], runs, read, to, first)
            dx[:, read].addcmul_(d_part, taps[tap])
            d_taps[tap] = (d_part * x[:, read]).sum((0, 1))
        return dx.to(x.dtype), d_taps.mT[:, None].to(weight.dtype), None, None, None, None
