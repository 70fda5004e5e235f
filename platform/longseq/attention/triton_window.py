"""Exact attention inside a sliding window by Triton kernels: see :mod:`longseq.attention.window` for the formulas.

Forward and dq go through the blocks of keys in reach of a block of queries, dk and dv through the queries in reach of
a block of keys; so every number has one writer, and a repeated run gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longseq.attention import window_operator
from longseq.attention.parts import Part
from longseq.attention.state import widened
from longseq.attention.triton_kernels import INFINITY, NOTHING, load_rows, product, put_rows, rows_product
from longseq.attention.triton_launch import on, padded, pointer

# Rows that a program answers for, and rows of the other side that it sees at a time; more overflow the registers.
BLOCK = 64
STEP = 32


@triton.jit
def _scores(
    x, x_rows, x_real, y, y_rows, y_real, runs, gamma, first_x, first_y, length, d, window, scale,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, RUNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """s of queries x and keys y, or with KEYS of keys x and queries y; −inf out of reach. And the distances."""
    i = first_x + x_rows
    j = first_y + y_rows
    ahead = i[:, None] - j[None, :]  # by how much the query is the later one
    if KEYS:
        ahead = -ahead
    distance = tl.abs(ahead)
    seen = x_real[:, None] & y_real[None, :] & (distance < window)
    if CAUSAL:
        seen = seen & (ahead >= 0)
    if RUNS:
        x_run = tl.load(runs + i, mask=i < length, other=-1)
        y_run = tl.load(runs + j, mask=j < length, other=-1)
        seen = seen & (x_run[:, None] == y_run[None, :])
    distance = distance.to(tl.float32)
    scores = rows_product(x, x_rows, x_real, y, y_rows, y_real, d, D) * scale - gamma * distance
    return tl.where(seen, scores, -INFINITY), distance


@triton.jit
def _visible(hidden, rows, first, length, HIDDEN: tl.constexpr):
    keep = first + rows < length
    if HIDDEN:
        keep = keep & (tl.load(hidden + first + rows, mask=keep, other=1) == 0)
    return keep


@triton.jit
def attend_near(
    q, k, v, hidden, runs, decay, out, lse, length, d, e, window, zero, scale,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr,
    B: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out and the log-denominator of one block of queries."""
    n = tl.program_id(1).to(tl.int64)
    at = n * length
    first = tl.program_id(0) * B
    rows = tl.arange(0, B)
    real = first + rows < length
    gamma = 0.0
    if DECAY:
        gamma = tl.load(decay + n)
    top = tl.full((B,), NOTHING, tl.float32)
    den = tl.zeros((B,), tl.float32)
    num = tl.zeros((B, E), tl.float32)
    stop = first + B
    if not CAUSAL:
        stop = tl.minimum(length, stop + window - 1)
    for start in range(tl.maximum(0, first - window + 1) // STEP * STEP, stop, STEP):
        near = tl.arange(0, STEP)
        keep = _visible(hidden + at, near, start, length, HIDDEN)
        scores, _ = _scores(
            q + (at + first) * d + start * zero, rows, real, k + (at + start) * d, near, keep, runs + at,
            gamma, first, start, length, d, window, scale, False, CAUSAL, RUNS, D,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        fade = tl.exp(top - new_top)
        den = den * fade + tl.sum(weights, 1)
        num = num * fade[:, None] + product(weights, load_rows(v + (at + start) * e, near, keep, e, 0, E))
        top = new_top
    blind = den == 0.0
    put_rows(out + (at + first) * e, rows, real, e, num / tl.where(blind, 1.0, den)[:, None], E)
    tl.store(lse + at + first + rows, tl.where(blind, NOTHING, tl.log(den) + top), mask=real)


@triton.jit
def queries_vjp_near(
    q, k, v, dout, hidden, runs, decay, lse, shared, dq, d_decay, length, d, e, window, zero, scale,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr,
    B: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dq of one block, and its part in the gradient of the decay: (N, blocks)."""
    n = tl.program_id(1).to(tl.int64)
    at = n * length
    first = tl.program_id(0) * B
    rows = tl.arange(0, B)
    real = first + rows < length
    gamma = 0.0
    if DECAY:
        gamma = tl.load(decay + n)
    log_den = tl.load(lse + at + first + rows, mask=real, other=0.0)
    shift = tl.load(shared + at + first + rows, mask=real, other=0.0)
    gradient = tl.zeros((B, D), tl.float32)
    moment = tl.zeros((B,), tl.float32)
    stop = first + B
    if not CAUSAL:
        stop = tl.minimum(length, stop + window - 1)
    for start in range(tl.maximum(0, first - window + 1) // STEP * STEP, stop, STEP):
        near = tl.arange(0, STEP)
        keep = _visible(hidden + at, near, start, length, HIDDEN)
        keys = k + (at + start) * d
        scores, distance = _scores(
            q + (at + first) * d + start * zero, rows, real, keys, near, keep, runs + at,
            gamma, first, start, length, d, window, scale, False, CAUSAL, RUNS, D,
        )  # fmt: skip
        grad = dout + (at + first) * e + start * zero
        d_scores = rows_product(grad, rows, real, v + (at + start) * e, near, keep, e, E) + shift[:, None]
        d_scores *= tl.exp(scores - log_den[:, None])
        if DECAY:
            moment += tl.sum(d_scores * distance, 1)
        gradient += product(d_scores, load_rows(keys, near, keep, d, 0, D))
    put_rows(dq + (at + first) * d, rows, real, d, gradient * scale, D)
    if DECAY:
        tl.store(d_decay + n * tl.num_programs(0) + tl.program_id(0), -tl.sum(moment, 0))


@triton.jit
def keys_vjp_near(
    q, k, v, dout, hidden, runs, decay, lse, shared, dk, dv, length, d, e, window, zero, scale,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr,
    B: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys."""
    n = tl.program_id(1).to(tl.int64)
    at = n * length
    first = tl.program_id(0) * B
    rows = tl.arange(0, B)
    keep = _visible(hidden + at, rows, first, length, HIDDEN)
    gamma = 0.0
    if DECAY:
        gamma = tl.load(decay + n)
    key_gradient = tl.zeros((B, D), tl.float32)
    value_gradient = tl.zeros((B, E), tl.float32)
    begin = first
    if not CAUSAL:
        begin = tl.maximum(0, first - window + 1) // STEP * STEP
    for start in range(begin, tl.minimum(length, first + B + window - 1), STEP):
        near = tl.arange(0, STEP)
        real = start + near < length
        queries = q + (at + start) * d
        scores, _ = _scores(
            k + (at + first) * d + start * zero, rows, keep, queries, near, real, runs + at,
            gamma, first, start, length, d, window, scale, True, CAUSAL, RUNS, D,
        )  # fmt: skip
        weights = tl.exp(scores - tl.load(lse + at + start + near, mask=real, other=0.0)[None, :])
        grad = dout + (at + start) * e
        d_scores = rows_product(v + (at + first) * e + start * zero, rows, keep, grad, near, real, e, E)
        d_scores += tl.load(shared + at + start + near, mask=real, other=0.0)[None, :]
        value_gradient += product(weights, load_rows(grad, near, real, e, 0, E))
        key_gradient += product(d_scores * weights, load_rows(queries, near, real, d, 0, D))
    inside = first + rows < length
    put_rows(dk + (at + first) * d, rows, inside, d, key_gradient * scale, D)
    put_rows(dv + (at + first) * e, rows, inside, e, value_gradient, E)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool,
    hidden: Tensor | None = None,
    runs: Tensor | None = None,
    decay: Tensor | None = None,
) -> Part:
    """See :func:`longseq.attention.window_operator.window_attention`."""
    return window_operator.window_attention(
        q, k, v, window=window, causal=causal, hidden=hidden, runs=runs, decay=decay, backend="triton"
    )


class _Launch:
    """What the kernels of both passes are given."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        hidden: Tensor | None,
        runs: Tensor | None,
        window: int,
        causal: bool,
    ) -> None:
        q, k, v = self.rows = tuple(widened(x).contiguous() for x in (q, k, v))
        mask = None if hidden is None else hidden.contiguous().view(torch.uint8)
        numbers = None if runs is None else runs.to(torch.int32).contiguous()
        rates = None if decay is None else decay.contiguous()
        self.sizes = (q.shape[1], q.shape[2], v.shape[2], min(window, q.shape[1]), 0, q.shape[2] ** -0.5)
        self.tiles: dict[str, Any] = {
            "CAUSAL": causal,
            "HIDDEN": mask is not None,
            "RUNS": numbers is not None,
            "DECAY": rates is not None,
            "B": BLOCK,
            "STEP": STEP,
            "D": padded(q.shape[2]),
            "E": padded(v.shape[2]),
            "num_warps": 4,
            "num_stages": 1,
        }
        self.optional = [pointer(x, q) for x in (mask, numbers, rates)]


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    hidden: Tensor | None,
    runs: Tensor | None,
    window: int,
    causal: bool,
) -> Part:
    """See :func:`longseq.attention.window.window_forward`."""
    launch = _Launch(q, k, v, decay, hidden, runs, window, causal)
    q, k, v = launch.rows
    out, lse = torch.empty_like(v), v.new_empty(*v.shape[:2], 1)
    grid = triton.cdiv(q.shape[1], BLOCK), len(q)
    with on(q.device):
        attend_near[grid](q, k, v, *launch.optional, out, lse, *launch.sizes, **launch.tiles)
    return out, lse


def window_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    hidden: Tensor | None,
    runs: Tensor | None,
    window: int,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See :func:`longseq.attention.window.window_backward`."""
    launch = _Launch(q, k, v, decay, hidden, runs, window, causal)
    q, k, v = launch.rows
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    shared = -(dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        shared += dlse
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grid = triton.cdiv(q.shape[1], BLOCK), len(q)
    d_decay = q.new_empty(len(q), grid[0])
    given = q, k, v, dout, *launch.optional, lse, shared
    with on(q.device):
        queries_vjp_near[grid](*given, dq, d_decay, *launch.sizes, **launch.tiles)
        keys_vjp_near[grid](*given, dk, dv, *launch.sizes, **launch.tiles)
    return dq, dk, dv, d_decay.sum(1, dtype=torch.float64)[:, None, None] if wants_decay else None
