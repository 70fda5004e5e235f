"""Queries, keys and values of all heads out of one matrix, rotated, by a Triton kernel; and gradients back into it.

The formula is that of :func:`longseq.attention.rotary.rotate`, in fp32, rounded once.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longseq.attention.triton_launch import on, pointer
from longseq.attention.triton_rows import rounded

TILE = 2048  # numbers of half a head that a program moves at a time
_VARY = ("length", "batch_step", "row_step", "sines")


@triton.jit
def _move(
    joint, parted, outside, inside, keep, cos, sin, half, APART: tl.constexpr, TURN: tl.constexpr
):  # fmt: skip
    """Both halves of a head of T positions from one place to the other; the angles are those of this direction."""
    if APART:
        source, at, target, to = joint, outside, parted, inside
    else:
        source, at, target, to = parted, inside, joint, outside
    a = tl.load(source + at, mask=keep, other=0.0)
    b = tl.load(source + at + half, mask=keep, other=0.0)
    if TURN:
        a, b = a.to(tl.float32), b.to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    tl.store(target + to, rounded(a, target.dtype.element_ty), mask=keep)
    tl.store(target + to + half, rounded(b, target.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_VARY)
def move_heads(
    joint, q, k, v, table, length, heads, half, batch_step, row_step, sines,
    APART: tl.constexpr, ROTARY: tl.constexpr, T: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """T positions of one head: (B, L, 3, H, D) to three of (B, H, L, D) if APART, else back."""
    n = tl.program_id(1).to(tl.int64)
    batch, head = n // heads, n % heads
    rows, columns = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64), tl.arange(0, HALF)
    keep = (rows < length)[:, None] & (columns < half)[None, :]
    inside = (n * length + rows)[:, None] * (2 * half) + columns[None, :]
    width = heads * 2 * half
    outside = (batch * length + rows)[:, None] * (3 * width) + head * 2 * half + columns[None, :]
    cos, sin = 1.0, 0.0
    if ROTARY:
        angles = table + batch * batch_step + rows[:, None] * row_step + columns[None, :]
        cos = tl.load(angles, mask=keep, other=0.0)
        sin = tl.load(angles + sines, mask=keep, other=0.0)
        if not APART:
            sin = -sin
    _move(joint, q, outside, inside, keep, cos, sin, half, APART, ROTARY)
    _move(joint, k, outside + width, inside, keep, cos, sin, half, APART, ROTARY)
    _move(joint, v, outside + 2 * width, inside, keep, cos, sin, half, APART, False)


def apart(qkv: Tensor, heads: int, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D) of qkv (B, L, 3E); rotary (2, L, D/2) or (2, B, 1, L, D/2)."""
    batch, length, width = qkv.shape
    q, k, v = (qkv.new_empty(batch, heads, length, width // (3 * heads)) for _ in range(3))
    _launch(qkv, q, k, v, rotary, forward=True)
    return q, k, v


def together(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor | None) -> Tensor:
    """The gradient of qkv, of those of q, k and v."""
    batch, heads, length, head_dim = q.shape
    qkv = q.new_empty(batch, length, 3 * heads * head_dim)
    _launch(qkv, q.contiguous(), k.contiguous(), v.contiguous(), rotary, forward=False)
    return qkv


def _launch(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Tensor | None, *, forward: bool) -> None:
    batch, heads, length, head_dim = q.shape
    steps = (0, 0, 0)
    if rotary is not None:
        rotary = rotary if rotary.stride(-1) == 1 else rotary.contiguous()
        own = rotary.ndim == 5 and len(rotary[0]) > 1  # positions of its own for each row
        steps = rotary.stride(1) if own else 0, rotary.stride(-2), rotary.stride(0)
    half = triton.next_power_of_2(head_dim // 2)
    positions = max(1, TILE // half)
    with on(qkv.device):
        move_heads[triton.cdiv(length, positions), batch * heads](
            qkv, q, k, v, pointer(rotary, q), length, heads, head_dim // 2, *steps,
            APART=forward, ROTARY=rotary is not None, T=positions, HALF=half,
        )  # fmt: skip
