"""NaN and Inf stay where they belong: in what sees them.

The products that attention is made of weigh what a query does not see by 0, and 0 · NaN is NaN: it would reach other
documents and earlier positions of the same chunk. So where a result is not finite, attention is computed again with
zeros in the place of such rows, and NaN is put where a query sees one of them. Backward likewise: a query that has
become NaN hands NaN to the keys that it sees, if its gradient is not zero, and nothing to others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.first_order import Saved, first_order

Rows = tuple[Tensor, Tensor, Tensor]


def isolated(
    attend: Callable[[Rows], Tensor],
    rows: Rows,
    hidden: Tensor | None,
    runs: Tensor | None,
    causal: bool,
    reach: int,
) -> Tensor:
    """``attend(rows)``, in which NaN and Inf of the rows reach what sees them, and nothing else.

    On a GPU it is not looked for: to ask whether there is any would stop the queue of kernels at every layer.

    Args:
        rows: q (N, Lq, d), k (N, L, d) and v (N, L, e).
        hidden, runs: as of :func:`longseq.attention.scan.scan`.
        causal: queries do not see later keys.
        reach: they see keys less than this many positions away. 0: all.
    """
    out = attend(rows)
    if out.device.type != "cpu" or bool(out.detach().sum().isfinite()):
        return out
    bad_q, bad_k, bad_v = (~x.detach().isfinite().all(-1) for x in rows)
    bad_k = bad_k | bad_v
    if hidden is not None:
        bad_k = bad_k & ~hidden
    if not (bad_q.any() or bad_k.any()):
        return out
    if bad_k.shape == bad_q.shape:
        seen = _sees(bad_k, runs, causal, reach)
    else:  # all queries see all keys
        seen = bad_k.any(1, keepdim=True).expand_as(bad_q)
    link = _Link(runs, causal, reach)
    q, k, v = _Entry.apply(bad_q, bad_k, link, *rows)
    return _Exit.apply(attend((q, k, v)), bad_q | seen, link)


class _Link:
    """What the end of a backward pass must know of its beginning."""

    def __init__(self, runs: Tensor | None, causal: bool, reach: int):
        self.runs, self.causal, self.reach = runs, causal, reach
        self.bad: Tensor | None = None  # (N, Lq) the queries whose gradient is NaN

    def keys(self, length: int) -> Tensor:
        """(N, L) the keys that one of them sees."""
        assert self.bad is not None
        if self.bad.shape[1] != length:
            return self.bad.any(1, keepdim=True).expand(-1, length)
        runs = None if self.runs is None else (self.runs[:, -1:] - self.runs).flip(1)
        return _sees(self.bad.flip(1), runs, self.causal, self.reach).flip(1)


class _Entry(torch.autograd.Function):
    """Zeros for bad rows; backward, NaN for what a bad query saw."""

    @staticmethod
    def forward(ctx: Any, bad_q: Tensor, bad_k: Tensor, link: _Link, q: Tensor, k: Tensor, v: Tensor) -> Rows:
        ctx.link = link
        bad = bad_k[..., None]
        return q.masked_fill(bad_q[..., None], 0.0), k.masked_fill(bad, 0.0), v.masked_fill(bad, 0.0)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        keys = ctx.link.keys(dk.shape[1])[..., None]
        dq = dq.masked_fill(ctx.link.bad[..., None], torch.nan)
        return None, None, None, dq, dk.masked_fill(keys, torch.nan), dv.masked_fill(keys, torch.nan)


class _Exit(torch.autograd.Function):
    """NaN for queries that are bad or see a bad key; backward, zeros for their gradients, which are told the entry."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bad: Tensor, link: _Link) -> Tensor:
        ctx.link = link
        ctx.save_for_backward(bad)
        return out.masked_fill(bad[..., None], torch.nan)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor) -> tuple[Tensor | None, ...]:
        (bad,) = saved
        ctx.link.bad = (bad & (dout != 0).any(-1)) | ~dout.isfinite().all(-1)
        return dout.masked_fill((bad | ctx.link.bad)[..., None], 0.0), None, None


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
