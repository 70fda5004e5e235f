"""NaN and Inf stay where they belong: in what sees them.

The products that attention is made of weigh what a query does not see by 0, and 0 · NaN is NaN: it would reach other
documents and earlier positions of the same chunk. So where a result is not finite, attention is computed again with
zeros in the place of such rows, and NaN is put where a query sees one of them. Backward likewise: a query that has
become NaN, or whose incoming gradient is, hands NaN to the keys that it sees, if its gradient is not zero, and nothing
to others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.context.group import ContextGroup
from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import is_traced

Inputs = tuple[Tensor, ...]  # q, k, v; and what all queries see as well, (N, ·, ·): the state of earlier keys


@dataclass(frozen=True, eq=False)
class Sight:
    """Which keys a query sees.

    Attributes:
        runs: gives the documents of N whole rows, as of :func:`longseq.attention.scan.scan`, or None. With a context
            all ranks of the group call it.
        causal: queries do not see later keys.
        reach: they see keys less than this many positions away. 0: all.
        context: the ranks that hold slices of the rows, or None.
    """

    runs: Callable[[], Tensor | None]
    causal: bool
    reach: int = 0
    context: ContextGroup | None = None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.context is None else self.context.any(flag)

    def seeing(self, bad: Tensor, length: int) -> Tensor:
        """(..., length) which queries see a bad key, of (..., L)."""
        return self._reached(bad, length, forward=True)

    def seen(self, bad: Tensor, length: int) -> Tensor:
        """(..., length) which keys are seen by a bad query, of (..., L)."""
        return self._reached(bad, length, forward=False)

    def _reached(self, bad: Tensor, length: int, *, forward: bool) -> Tensor:
        if bad.shape[-1] != length:  # all queries see all keys
            return bad.any(-1, keepdim=True).expand(*bad.shape[:-1], length)
        runs, context, of = self.runs(), self.context, bad.shape[:-1]
        bad = bad.flatten(0, -2)
        if context is not None:
            bad = context.gather_rows(bad.byte()).transpose(0, 1).flatten(1).bool()
        if forward:
            found = _sees(bad, runs, self.causal, self.reach)
        else:
            runs = None if runs is None else (runs[:, -1:] - runs).flip(1)
            found = _sees(bad.flip(1), runs, self.causal, self.reach).flip(1)
        if context is not None:
            found = found.unflatten(1, (context.size, length))[:, context.rank]
        made: Tensor = found.unflatten(0, of)
        return made


def isolated(attend: Callable[[Inputs], Tensor], rows: Inputs, hidden: Tensor | None, sight: Sight) -> Tensor:
    """``attend(rows)``, in which NaN and Inf of the rows and of gradients reach what sees them, and nothing else.

    On a GPU it is not looked for: to ask whether there is any would stop the queue of kernels at every layer. Nor while
    the operations are traced, when there are no data yet.

    Args:
        attend: (..., Lq, e) of q (..., Lq, d), k (..., L, d) and v (..., L, e); called again with other rows, if need
            be. The axes in front are N rows.
        rows: q, k, v, and there may be a state that all queries read.
        hidden: (..., L) bool, True where a key is padding, or None.
        sight: which keys a query sees.
    """
    if not is_looked_for(rows[0]):
        return attend(rows)
    link = None
    if torch.is_grad_enabled() and any(x.requires_grad for x in rows):
        link = _Link(sight)
        rows = _Entry.apply(link, *rows)
    out, bad = attend(rows), None
    if sight.any(not _is_sound(out)):
        bad_q, bad_k, bad_v = (~x.detach().isfinite().all(-1) for x in rows[:3])
        bad_k = bad_k | bad_v
        if hidden is not None:
            bad_k = bad_k & ~hidden
        if sight.any(bool(bad_q.any() or bad_k.any())):
            bad = bad_q | sight.seeing(bad_k, bad_q.shape[-1])
            pairs = zip(rows, (bad_q, bad_k, bad_k), strict=False)
            out = attend((*(x.masked_fill(of[..., None], 0.0) for x, of in pairs), *rows[3:]))
    if link is not None:
        made: Tensor = _Exit.apply(out, bad, link)
        return made
    return out if bad is None else out.masked_fill(bad[..., None], torch.nan)


def is_looked_for(x: Tensor) -> bool:
    """Whether what is not finite is kept apart: on a CPU, and of data, not while operations are traced."""
    return x.device.type == "cpu" and not is_traced(x)


def _is_sound(x: Tensor) -> bool:
    return bool(x.detach().sum().isfinite())


class _Link:
    """What the end of a backward pass must know of its beginning."""

    def __init__(self, sight: Sight):
        self.sight = sight
        self.bad: Tensor | None = None  # (..., Lq) the queries whose gradient is NaN, if there may be any


class _Entry(torch.autograd.Function):
    """The rows; backward, NaN for what a bad query saw."""

    @staticmethod
    def forward(ctx: Any, link: _Link, *rows: Tensor) -> Inputs:
        ctx.link = link
        return tuple(x.view_as(x) for x in rows)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bad = ctx.link.bad
        if bad is None:
            return None, *grads
        dq, dk, dv, *states = grads
        keys = ctx.link.sight.seen(bad, dk.shape[-2])[..., None]
        dq = dq.masked_fill(bad[..., None], torch.nan)
        states = [x.masked_fill(bad.any(-1)[:, None, None], torch.nan) for x in states]
        return None, dq, dk.masked_fill(keys, torch.nan), dv.masked_fill(keys, torch.nan), *states


class _Exit(torch.autograd.Function):
    """NaN for queries that are bad or see a bad key; backward, zeros for their gradients, which are told the entry."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bad: Tensor | None, link: _Link) -> Tensor:
        ctx.link = link
        ctx.save_for_backward(bad)
        return out.view_as(out) if bad is None else out.masked_fill(bad[..., None], torch.nan)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor) -> tuple[Tensor | None, ...]:
        (bad,), link = saved, ctx.link
        if not link.sight.any(bad is not None or not _is_sound(dout)):
            return dout, None, None
        link.bad = ~dout.isfinite().all(-1)
        nothing = link.bad
        if bad is not None:
            link.bad, nothing = link.bad | (bad & (dout != 0).any(-1)), link.bad | bad
        return dout.masked_fill(nothing[..., None], 0.0), None, None


def _sees(bad: Tensor, runs: Tensor | None, causal: bool, reach: int) -> Tensor:
    """(N, L) which positions see a bad one."""
    upto = bad.long().cumsum(1)  # how many there are up to and with each position
    runs = torch.zeros_like(upto) if runs is None else runs.long()
    low = torch.zeros_like(upto).scatter_reduce(1, runs, upto - bad.long(), "amin", include_self=False).gather(1, runs)
    high = upto
    if not causal:
        high = torch.zeros_like(upto).scatter_reduce(1, runs, upto, "amax", include_self=False).gather(1, runs)
    if reach:
        length = bad.shape[1]
        low = torch.maximum(low, F.pad(upto, (reach, 0))[:, :length])
        if not causal:
            last = (torch.arange(length, device=bad.device) + reach - 1).clamp(max=length - 1)
            high = torch.minimum(high, upto[:, last])
    return high > low
