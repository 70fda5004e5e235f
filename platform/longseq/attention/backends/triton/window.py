"""Exact attention inside a sliding window by Triton kernels: see :mod:`longseq.attention.window` for the formulas.

Forward and dq go through the blocks of keys in reach of a block of queries, dk and dv through the queries in reach of
a block of keys; so every number has one writer, and a repeated run gives the same bits. Programs are independent:
L / 64 for each of N.

bf16 and fp16 rows are operands as they are; p, ds and dout, the other factors, are rounded to their type. Sums,
exponents and log-denominators are fp32. fp32 rows are read again for each block, in slices, as the parts of their
numbers need the registers: ``zero``, an argument that is 0, keeps the compiler from carrying them through the loop.

Inside, exponents are of 2: s and lse times log2 e.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longseq.attention.backends.triton.launch import chip, on, padded, pointer
from longseq.attention.backends.triton.rows import load_rows, product, put_rows, rounded, sliced_product
from longseq.attention.parts import Part
from longseq.attention.scan import Gradients, Rows
from longseq.attention.state import NOTHING as NO_KEY

# Rows of the other side that a program sees at a time, where they are fp32: more overflow the registers.
STEP_FP32 = 32
# Kernels are not compiled again for these: they change with the length.
_VARY = ("length", "window", "before")
NOTHING = tl.constexpr(NO_KEY)
INFINITY = tl.constexpr(math.inf)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _visible(hidden, rows, length, HIDDEN: tl.constexpr):
    """Which keys are there to be seen."""
    keep = rows < length
    if HIDDEN:
        keep = keep & (tl.load(hidden + rows, mask=keep, other=1) == 0)
    return keep


@triton.jit
def _reach(
    scores, i, j, first, keep, runs, decay, gamma, length, window, before, scale,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """s · log2 e of products qᵀk, −inf out of reach, and the distances.

    Rows are queries i and columns keys j, or with KEYS the other way round; ``keep`` is of the keys. Distances are
    taken from ``first``, near which fp32 has every integer. With GATE they are what its sums (``decay``, float64) lose
    from one to the other: such numbers are small where a weight is not.
    """
    ahead = i[None, :] - j[:, None] if KEYS else i[:, None] - j[None, :]  # by how much the query is the later one
    # One comparison for both ends: 0 ≤ ahead + before < window + before; a negative number is a large unsigned one.
    seen = (ahead + before).to(tl.uint32, bitcast=True) < (window + before).to(tl.uint32, bitcast=True)
    if HIDDEN or not CAUSAL:  # a key behind the end is later than every query
        seen = seen & (keep[:, None] if KEYS else keep[None, :])
    if RUNS:
        q_run = tl.load(runs + i, mask=i < length, other=-1)
        k_run = tl.load(runs + j, mask=j < length, other=-1)
        seen = seen & (k_run[:, None] == q_run[None, :] if KEYS else q_run[:, None] == k_run[None, :])
    scores = scores * (scale * LOG2_E)
    x, y = (i - first).to(tl.float32), (j - first).to(tl.float32)
    if GATE:
        here = tl.load(decay + first)
        x = (here - tl.load(decay + tl.minimum(i + 1, length))).to(tl.float32)
        y = (here - tl.load(decay + tl.minimum(j + 1, length))).to(tl.float32)
    distance = tl.abs(x[None, :] - y[:, None]) if KEYS else tl.abs(x[:, None] - y[None, :])
    if DECAY:
        scores -= gamma * LOG2_E * distance
    if GATE:
        scores -= LOG2_E * distance
    return tl.where(seen, scores, -INFINITY), distance


@triton.jit(do_not_specialize=_VARY)
def attend_near(
    q, k, v, hidden, runs, decay, out, lse, length, window, before, d: tl.constexpr, e: tl.constexpr, zero, scale,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    B: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out and the log-denominator of one block of queries."""
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32
    n = tl.program_id(1).to(tl.int64)
    at = n * length
    first = tl.program_id(0) * B
    rows = tl.arange(0, B)
    near = tl.arange(0, STEP)
    real = first + rows < length
    gamma = tl.load(decay + n) if DECAY else 0.0
    if GATE:
        decay += at + n
    queries = q + (at + first) * d
    if HALF:
        query = load_rows(queries, rows, real, d, 0, D)
    top = tl.full((B,), NOTHING, tl.float32)
    den = tl.zeros((B,), tl.float32)
    num = tl.zeros((B, E), tl.float32)
    stop = tl.minimum(length, first + B + before)
    for start in range(tl.maximum(0, first - window + 1) // STEP * STEP, stop, STEP):
        keep = _visible(hidden + at, start + near, length, HIDDEN)
        keys = k + (at + start) * d
        if HALF:
            scores = product(query, tl.trans(load_rows(keys, near, keep, d, 0, D)))
        else:
            scores = sliced_product(queries + start * zero, rows, real, keys, near, keep, d, D)
        scores, _ = _reach(
            scores, first + rows, start + near, first, keep, runs + at, decay, gamma, length, window, before,
            scale, False, CAUSAL, HIDDEN, RUNS, DECAY, GATE,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        value = load_rows(v + (at + start) * e, near, keep, e, 0, E)
        weights = rounded(weights, value.dtype)  # the sum is of what is multiplied: a mean stays a mean
        den = den * fade + tl.sum(weights.to(tl.float32), 1)
        num = product(weights, value, num * fade[:, None])
        top = new_top
    blind = den == 0.0
    put_rows(out + (at + first) * e, rows, real, e, num / tl.where(blind, 1.0, den)[:, None], E)
    tl.store(lse + at + first + rows, tl.where(blind, NOTHING, (tl.log2(den) + top) * LN_2), mask=real)


@triton.jit(do_not_specialize=_VARY)
def queries_vjp_near(
    q, k, v, hidden, runs, decay, out, lse, dout, dlse, half_dout, shared, dq, d_decay,
    length, window, before, d: tl.constexpr, e: tl.constexpr, zero, scale,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    DLSE: tl.constexpr, ONTO: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dq of one block, added to what is there if ONTO, and its part in the gradient of the decay (N, blocks).

    For the keys' pass: ``shared`` (N, L), dlse − doutᵀout, and ``half_dout`` (N, L, e), dout in the operands' type.
    With GATE the queries' part in the gradient of its sums, (N, L): weights of later keys count negatively.
    """
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32
    n = tl.program_id(1).to(tl.int64)
    at = n * length
    first = tl.program_id(0) * B
    rows = tl.arange(0, B)
    near = tl.arange(0, STEP)
    real = first + rows < length
    gamma = tl.load(decay + n) if DECAY else 0.0
    if GATE:
        decay += at + n
    log_den = tl.load(lse + at + first + rows, mask=real, other=0.0) * LOG2_E
    queries, grads = q + (at + first) * d, dout + (at + first) * e
    # Rounded first: the error in dout is then multiplied by v − out, not by either.
    grad_half = rounded(load_rows(grads, rows, real, e, 0, E), q.dtype.element_ty)
    shift = -tl.sum(grad_half.to(tl.float32) * load_rows(out + (at + first) * e, rows, real, e, 0, E), 1)
    if DLSE:
        shift += tl.load(dlse + at + first + rows, mask=real, other=0.0)
    tl.store(shared + at + first + rows, shift, mask=real)
    if HALF:
        query = load_rows(queries, rows, real, d, 0, D)
        put_rows(half_dout + (at + first) * e, rows, real, e, grad_half, E)
    gradient = tl.zeros((B, D), tl.float32)
    moment = tl.zeros((B,), tl.float32)
    row_sum = tl.zeros((B,), tl.float32)
    mean = tl.zeros((B,), tl.float32)
    stop = tl.minimum(length, first + B + before)
    for start in range(tl.maximum(0, first - window + 1) // STEP * STEP, stop, STEP):
        keep = _visible(hidden + at, start + near, length, HIDDEN)
        keys, values = k + (at + start) * d, v + (at + start) * e
        key = load_rows(keys, near, keep, d, 0, D)
        if HALF:
            scores = product(query, tl.trans(key))
            d_scores = product(grad_half, tl.trans(load_rows(values, near, keep, e, 0, E)))
        else:
            scores = sliced_product(queries + start * zero, rows, real, keys, near, keep, d, D)
            d_scores = sliced_product(grads + start * zero, rows, real, values, near, keep, e, E)
        scores, distance = _reach(
            scores, first + rows, start + near, first, keep, runs + at, decay, gamma, length, window, before,
            scale, False, CAUSAL, HIDDEN, RUNS, DECAY, GATE,
        )  # fmt: skip
        weights = tl.exp2(scores - log_den[:, None])
        d_scores = (d_scores + shift[:, None]) * weights
        if DECAY:
            moment += tl.sum(d_scores * distance, 1)
            row_sum += tl.sum(d_scores, 1)
            mean += tl.sum(weights * distance, 1)
        if GATE:
            row_sum += tl.sum(d_scores, 1)
            earlier = (first + rows)[:, None] >= (start + near)[None, :]
            moment += tl.sum(tl.where(earlier, d_scores, -d_scores), 1)
            mean += tl.sum(tl.where(earlier, weights, -weights), 1)
        gradient = product(rounded(d_scores, key.dtype), key, gradient)
    gradient *= scale
    if ONTO:
        gradient += load_rows(dq + (at + first) * d, rows, real, d, 0, D).to(tl.float32)
    put_rows(dq + (at + first) * d, rows, real, d, gradient, D)
    if DECAY:
        # A row's sum is dlse. What it is off, by the rounding of the weights in out, is off at every distance.
        if DLSE:
            row_sum -= tl.load(dlse + at + first + rows, mask=real, other=0.0)
        moment -= row_sum * mean
        tl.store(d_decay + n * tl.num_programs(0) + tl.program_id(0), -tl.sum(moment, 0))
    if GATE:
        # As above; the keys' pass takes the same off.
        if DLSE:
            row_sum -= tl.load(dlse + at + first + rows, mask=real, other=0.0)
        tl.store(d_decay + at + first + rows, moment - row_sum * mean, mask=real)
        tl.store(shared + at + first + rows, shift - row_sum, mask=real)


@triton.jit(do_not_specialize=_VARY)
def keys_vjp_near(
    q, k, v, hidden, runs, decay, lse, dout, shared, dk, dv, d_decay,
    length, window, before, d: tl.constexpr, e: tl.constexpr, zero, scale,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    ONTO: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, added to what is there if ONTO. Products are of keys (rows) and queries.

    With GATE the keys' part in the gradient of its sums, (N, L), with the signs turned.
    """
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32
    n = tl.program_id(1).to(tl.int64)
    at = n * length
    first = tl.program_id(0) * B
    rows = tl.arange(0, B)
    near = tl.arange(0, STEP)
    keep = _visible(hidden + at, first + rows, length, HIDDEN)
    gamma = tl.load(decay + n) if DECAY else 0.0
    if GATE:
        decay += at + n
    keys, values = k + (at + first) * d, v + (at + first) * e
    if HALF:
        key, value = load_rows(keys, rows, keep, d, 0, D), load_rows(values, rows, keep, e, 0, E)
    key_gradient = tl.zeros((B, D), tl.float32)
    value_gradient = tl.zeros((B, E), tl.float32)
    moment = tl.zeros((B,), tl.float32)
    for start in range(tl.maximum(0, first - before) // STEP * STEP, tl.minimum(length, first + B + window - 1), STEP):
        real = start + near < length
        queries, grads = q + (at + start) * d, dout + (at + start) * e
        query = load_rows(queries, near, real, d, 0, D)
        grad = load_rows(grads, near, real, e, 0, E)
        if HALF:
            scores = product(key, tl.trans(query))
        else:
            scores = sliced_product(keys + start * zero, rows, keep, queries, near, real, d, D)
        scores, _ = _reach(
            scores, start + near, first + rows, first, keep, runs + at, decay, gamma, length, window, before,
            scale, True, CAUSAL, HIDDEN, RUNS, DECAY, GATE,
        )  # fmt: skip
        # A query behind the end has no weight: e^−∞.
        log_den = tl.load(lse + at + start + near, mask=real, other=INFINITY) * LOG2_E
        weights = tl.exp2(scores - log_den[None, :])
        value_gradient = product(rounded(weights, query.dtype), grad, value_gradient)
        if HALF:
            d_scores = product(value, tl.trans(grad))
        else:
            d_scores = sliced_product(values + start * zero, rows, keep, grads, near, real, e, E)
        d_scores = (d_scores + tl.load(shared + at + start + near, mask=real, other=0.0)[None, :]) * weights
        key_gradient = product(rounded(d_scores, query.dtype), query, key_gradient)
        if GATE:
            later = (start + near)[None, :] >= (first + rows)[:, None]
            moment += tl.sum(tl.where(later, d_scores, -d_scores), 1)
    inside = first + rows < length
    key_gradient *= scale
    if ONTO:
        key_gradient += load_rows(dk + (at + first) * d, rows, inside, d, 0, D).to(tl.float32)
        value_gradient += load_rows(dv + (at + first) * e, rows, inside, e, 0, E).to(tl.float32)
    put_rows(dk + (at + first) * d, rows, inside, d, key_gradient, D)
    put_rows(dv + (at + first) * e, rows, inside, e, value_gradient, E)
    if GATE:
        tl.store(d_decay + at + first + rows, -moment, mask=inside)


class _Launch:
    """What the kernels of both passes are given."""

    def __init__(self, rows: Rows, window: int, causal: bool) -> None:
        q, _, v = self.rows = tuple(x.contiguous() for x in rows.qkv)
        mask = None if rows.hidden is None else rows.hidden.contiguous().view(torch.uint8)
        numbers = None if rows.runs is None else rows.runs.to(torch.int32).contiguous()
        fading = None if rows.fading is None else rows.fading.detach().contiguous()
        self.optional = [pointer(x, q) for x in (mask, numbers, fading)]
        length, d, e = q.shape[1], q.shape[2], v.shape[2]
        window = min(window, length)
        self.sizes = (length, window, 0 if causal else window - 1, d, e, 0, d**-0.5)
        self.kinds: dict[str, Any] = {
            "CAUSAL": causal,
            "HIDDEN": mask is not None,
            "RUNS": numbers is not None,
            "DECAY": rows.decay is not None,
            "GATE": rows.gate is not None,
            "D": padded(d),
            "E": padded(e),
        }


def window_forward(rows: Rows, window: int, causal: bool) -> Part:
    """See :func:`longseq.attention.window.window_forward`."""
    launch = _Launch(rows, window, causal)
    q, k, v = launch.rows
    out = v.new_empty(v.shape, dtype=torch.float32)
    lse = out.new_empty(*v.shape[:2], 1)
    tiles = _tiles(q, v)
    with on(q.device):
        attend_near[triton.cdiv(q.shape[1], tiles["B"]), len(q)](
            q, k, v, *launch.optional, out, lse, *launch.sizes, **launch.kinds, **tiles
        )
    return out, lse


def window_backward(
    rows: Rows,
    window: int,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wants_decay: bool,
    onto: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    parts: bool = False,
) -> Gradients:
    """See :func:`longseq.attention.window.window_backward`. The first three are added to those of ``onto``, there.

    parts: of the decay's, (N, ·), and not their sums.
    """
    launch = _Launch(rows, window, causal)
    q, k, v = launch.rows
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dq, dk, dv = onto or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    launch.kinds["ONTO"] = onto is not None
    shared = torch.empty_like(lse)
    half_dout = dout if q.dtype == dout.dtype else torch.empty_like(dout, dtype=q.dtype)
    tiles, keys_tiles = _tiles(q, v), _tiles(q, v, keys=True)
    blocks = triton.cdiv(q.shape[1], tiles["B"])
    gated = rows.gate is not None
    d_decay = lse.new_empty(len(q), q.shape[1] if gated else blocks)
    d_keys = torch.empty_like(d_decay) if gated else d_decay
    given = (q, k, v, *launch.optional)
    with on(q.device):
        queries_vjp_near[blocks, len(q)](
            *given, out, lse, dout, dout if dlse is None else dlse.contiguous(), half_dout, shared, dq, d_decay,
            *launch.sizes, DLSE=dlse is not None, **launch.kinds, **tiles,
        )  # fmt: skip
        keys_vjp_near[triton.cdiv(q.shape[1], keys_tiles["B"]), len(q)](
            *given, lse, half_dout, shared, dk, dv, d_keys, *launch.sizes, **launch.kinds, **keys_tiles
        )
    if rows.gate is not None and wants_decay:
        d_gate = torch.zeros_like(rows.gate)
        d_gate[:, 1:, 0] = d_decay.double() + d_keys
        return Gradients(dq, dk, dv, d_gate)
    if not parts and wants_decay:
        d_decay = d_decay.sum(1, dtype=torch.float64)[:, None, None]
    return Gradients(dq, dk, dv, d_decay if wants_decay else None)


def _tiles(q: Tensor, v: Tensor, *, keys: bool = False) -> dict[str, int]:
    """Rows of a program (B) and of the other side (STEP), as the registers and the shared memory of the chip allow."""
    wgmma = chip(q.device).capability[0] in (9, 10)  # a product is 64 rows of four warps, and no narrower than 64
    wide = padded(max(q.shape[2], v.shape[2])) > 64
    if q.dtype == torch.float32:
        # Of 16 warps, products on sm_100 go without tensor memory, where the parts of fp32 numbers do not fit.
        warps = 16 if chip(q.device).capability[0] == 10 else 4
        block, step = 64, STEP_FP32 // 2 if keys and not wgmma else STEP_FP32
    else:
        block, step, warps = 64, *((64, 4) if wgmma else (64, 8) if wide else (32, 4))
    return {"B": block, "STEP": step, "num_warps": warps, "num_stages": 1}
