"""Queries, keys and values of all heads out of one matrix, normalised and rotated, by a Triton kernel; and back.

The formulas are those of :mod:`longseq.attention.heads`, in fp32, rounded once.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longseq.attention.backends.triton.launch import on, pointer
from longseq.attention.backends.triton.rows import rounded

TILE = 2048  # numbers of half a head that a program moves at a time
LEAST = tl.constexpr(1e-12)  # of a length that is divided by: torch.nn.functional.normalize's
_VARY = ("length", "batch_step", "row_step", "sines", "number")


@triton.jit
def _move(
    joint, parted, outside, inside, keep, rows, real, cos, sin, made, lengths, scale, half,
    APART: tl.constexpr, TURN: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Both halves of a head of T positions from one place to the other; the angles are those of this direction.

    With NORMALISE, x becomes y = s x / |x|; backward dx = s / |x| · (g − y (y g) / s²) of the gradient g of y, which is
    ``made``. Returns y g, of which the gradient of log s is the sum.
    """
    if APART:
        source, at, target, to = joint, outside, parted, inside
    else:
        source, at, target, to = parted, inside, joint, outside
    a = tl.load(source + at, mask=keep, other=0.0)
    b = tl.load(source + at + half, mask=keep, other=0.0)
    inner = tl.zeros((keep.shape[0],), tl.float32)
    if NORMALISE:
        a, b = a.to(tl.float32), b.to(tl.float32)
        if APART:
            inverse = 1 / tl.maximum(tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1)), LEAST)
            tl.store(lengths + rows, inverse, mask=real)
            a, b = a * (scale * inverse)[:, None], b * (scale * inverse)[:, None]
        else:
            ya = tl.load(made + inside, mask=keep, other=0.0).to(tl.float32)
            yb = tl.load(made + inside + half, mask=keep, other=0.0).to(tl.float32)
            inverse = tl.load(lengths + rows, mask=real, other=0.0)
            inner = tl.sum(a * ya, 1) + tl.sum(b * yb, 1)
            along = tl.where(inverse < 1 / LEAST, inner / (scale * scale), 0.0)[:, None]
            factor = (scale * inverse)[:, None]
            a, b = (a - ya * along) * factor, (b - yb * along) * factor
    if TURN:
        a, b = a.to(tl.float32), b.to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(target + to, rounded(a, target.dtype.element_ty), mask=keep)
    tl.store(target + to + half, rounded(b, target.dtype.element_ty), mask=keep)
    return inner


@triton.jit(do_not_specialize=_VARY)
def move_heads(
    joint, q, k, v, table, made_q, made_k, lengths, log_temperature, parts, length, heads, half, batch_step, row_step,
    sines, width_factor, number,
    APART: tl.constexpr, ROTARY: tl.constexpr, NORMALISE: tl.constexpr, T: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """T positions of one head: (B, L, 3, H, D) to three of (B, H, L, D) if APART, else back.

    ``lengths`` are 1 / |x| of the queries and then of the keys, (2, B, H, L).
    """
    n = tl.program_id(1).to(tl.int64)
    batch, head = n // heads, n % heads
    rows, columns = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64), tl.arange(0, HALF)
    real = rows < length
    keep = real[:, None] & (columns < half)[None, :]
    inside = (n * length + rows)[:, None] * (2 * half) + columns[None, :]
    width = heads * 2 * half
    outside = (batch * length + rows)[:, None] * (3 * width) + head * 2 * half + columns[None, :]
    cos, sin, scale = 1.0, 0.0, 1.0
    if ROTARY:
        angles = table + batch * batch_step + rows[:, None] * row_step + columns[None, :]
        cos = tl.load(angles, mask=keep, other=0.0)
        sin = tl.load(angles + sines, mask=keep, other=0.0)
        if not APART:
            sin = -sin
    if NORMALISE:
        scale = tl.exp(0.5 * tl.load(log_temperature + head).to(tl.float32)) * width_factor
    at = n * length + rows
    inner = _move(
        joint, q, outside, inside, keep, at, real, cos, sin, made_q, lengths, scale, half, APART, ROTARY, NORMALISE
    )
    inner += _move(
        joint, k, outside + width, inside, keep, at + number, real, cos, sin, made_k, lengths, scale, half,
        APART, ROTARY, NORMALISE,
    )  # fmt: skip
    _move(
        joint, v, outside + 2 * width, inside, keep, at, real, cos, sin, made_q, lengths, scale, half,
        APART, False, False,
    )  # fmt: skip
    if NORMALISE and not APART:
        tl.store(parts + n * tl.num_programs(0) + tl.program_id(0), 0.5 * tl.sum(inner, 0))


def apart(
    qkv: Tensor, heads: int, rotary: Tensor | None, log_temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v (B, H, L, D) of qkv (B, L, 3E), and with log τ (H, 1, 1) what :func:`together` needs besides.

    rotary: (2, L, D/2) or (2, B, 1, L, D/2).
    """
    batch, length, width = qkv.shape
    q, k, v = (qkv.new_empty(batch, heads, length, width // (3 * heads)) for _ in range(3))
    lengths = None if log_temperature is None else qkv.new_empty(2, batch, heads, length, dtype=torch.float32)
    _launch(qkv, q, k, v, rotary, log_temperature, (None, None, lengths), None)
    return q, k, v, lengths


def together(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rotary: Tensor | None,
    log_temperature: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of qkv and of log τ, of those of q, k and v."""
    batch, heads, length, head_dim = dq.shape
    qkv, parts = dq.new_empty(batch, length, 3 * heads * head_dim), None
    if log_temperature is not None:
        parts = dq.new_empty(batch, heads, triton.cdiv(length, _positions(head_dim)), dtype=torch.float32)
    gradients = dq.contiguous(), dk.contiguous(), dv.contiguous()
    _launch(qkv, *gradients, rotary, log_temperature, (q, k, lengths), parts, forward=False)
    if log_temperature is None or parts is None:
        return qkv, None
    return qkv, parts.sum((0, 2)).view_as(log_temperature).to(log_temperature.dtype)


def _positions(head_dim: int) -> int:
    """That a program moves."""
    made: int = max(1, TILE // triton.next_power_of_2(head_dim // 2))
    return made


def _launch(
    qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Tensor | None, log_temperature: Tensor | None,
    kept: tuple[Tensor | None, Tensor | None, Tensor | None], parts: Tensor | None, *, forward: bool = True,
) -> None:  # fmt: skip
    batch, heads, length, head_dim = q.shape
    steps = (0, 0, 0)
    if rotary is not None:
        rotary = rotary if rotary.stride(-1) == 1 else rotary.contiguous()
        own = rotary.ndim == 5 and len(rotary[0]) > 1  # positions of its own for each row
        steps = rotary.stride(1) if own else 0, rotary.stride(-2), rotary.stride(0)
    positions = _positions(head_dim)
    with on(qkv.device):
        move_heads[triton.cdiv(length, positions), batch * heads](
            qkv, q, k, v, pointer(rotary, q), *(pointer(x, q) for x in (*kept, log_temperature, parts)), length,
            heads, head_dim // 2, *steps, head_dim**0.25, batch * heads * length, APART=forward,
            ROTARY=rotary is not None, NORMALISE=log_temperature is not None, T=positions,
            HALF=triton.next_power_of_2(head_dim // 2),
        )  # fmt: skip
