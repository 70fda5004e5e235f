"""Attention over near and over far keys, put together by a Triton kernel and laid out for the linear map behind it.

The formulas are those of :mod:`longseq.attention.parts`, for two parts, with the log-factor s of the far one:

    out = w near + (1 − w) far    w = 1 / (1 + e^{lse_far + s − lse_near})    dlse_near = w (1 − w) doutᵀ(near − far)
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longseq.attention.backends.triton.launch import on, padded, pointer
from longseq.attention.backends.triton.rows import load_rows, put_rows, rounded
from longseq.attention.parts import Part

POSITIONS = 32  # of a program


@triton.jit
def _shares(near_lse, far_lse, share, at, real, head, SHARE: tl.constexpr):
    """What the near and the far part count for."""
    far = tl.load(far_lse + at, mask=real, other=0.0)
    if SHARE:
        far += tl.load(share + head).to(tl.float32)
    ahead = tl.load(near_lse + at, mask=real, other=0.0) - far
    return tl.sigmoid(ahead), tl.sigmoid(-ahead)


@triton.jit(do_not_specialize=("length",))
def combine_rows(
    near, near_lse, far, far_lse, share, out, length, heads, width: tl.constexpr, SHARE: tl.constexpr, T: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """(N, L, e) twice to (B, L, H, e)."""
    n = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * T + tl.arange(0, T)
    real = rows < length
    a, b = _shares(near_lse, far_lse, share, n * length + rows, real, n % heads, SHARE)
    base = n * length * width
    values = load_rows(near + base, rows, real, width, 0, E) * a[:, None]
    values += load_rows(far + base, rows, real, width, 0, E) * b[:, None]
    to = out + (n // heads) * length * heads * width + (n % heads) * width
    columns = tl.arange(0, E)
    keep = real[:, None] & (columns < width)[None, :]
    tl.store(to + rows[:, None].to(tl.int64) * (heads * width) + columns[None, :], values, mask=keep)


@triton.jit(do_not_specialize=("length", "batch_step", "head_step", "row_step"))
def combine_rows_vjp(
    near, near_lse, far, far_lse, share, grad, d_near, d_near_lse, d_far, d_far_lse, d_share,
    length, heads, width: tl.constexpr, batch_step, head_step, row_step,
    SHARE: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The gradients of both parts, and the program's part in that of the share, (N, programs)."""
    n = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * T + tl.arange(0, T)
    real = rows < length
    at = n * length + rows
    a, b = _shares(near_lse, far_lse, share, at, real, n % heads, SHARE)
    base = n * length * width
    columns = tl.arange(0, E)
    from_ = grad + (n // heads) * batch_step + (n % heads) * head_step
    keep = real[:, None] & (columns < width)[None, :]
    g = tl.load(from_ + rows[:, None].to(tl.int64) * row_step + columns[None, :], mask=keep, other=0.0).to(tl.float32)
    apart = load_rows(near + base, rows, real, width, 0, E) - load_rows(far + base, rows, real, width, 0, E)
    d_lse = tl.sum(g * apart, 1) * a * b
    put_rows(d_near + base, rows, real, width, g * a[:, None], E)
    put_rows(d_far + base, rows, real, width, g * b[:, None], E)
    tl.store(d_near_lse + at, d_lse, mask=real)
    tl.store(d_far_lse + at, -d_lse, mask=real)
    if SHARE:
        tl.store(d_share + n * tl.num_programs(0) + tl.program_id(0), -tl.sum(d_lse, 0))


@triton.jit
def put_rates(learned, rates, number, heads, LOG: tl.constexpr, B: tl.constexpr):
    """γ of each of N rows, of one number a head: γ itself or its logarithm."""
    n = tl.program_id(0) * B + tl.arange(0, B)
    rate = tl.load(learned + n % heads, mask=n < number, other=0.0).to(tl.float32)
    tl.store(rates + n, tl.exp(rate) if LOG else rate, mask=n < number)


@triton.jit
def _total(parts, head, heads, batch, size, B: tl.constexpr):
    """The sum of all numbers of one head, of (batch · heads, size)."""
    total = tl.zeros((B,), tl.float64)
    for first in range(0, batch * size, B):
        i = first + tl.arange(0, B)
        at = (i // size * heads + head).to(tl.int64) * size + i % size
        total += tl.load(parts + at, mask=i < batch * size, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=("batch", "near_size", "far_size", "share_size"))
def add_parts_of_heads(
    near, far, shares, rates, d_decay, d_share, heads, batch, near_size, far_size, share_size,
    DECAY: tl.constexpr, SHARE: tl.constexpr, LOG: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of one head's decay, or its logarithm, and of its share."""
    head = tl.program_id(0)
    if DECAY:
        total = _total(near, head, heads, batch, near_size, B) + _total(far, head, heads, batch, far_size, B)
        total = total.to(tl.float32)
        if LOG:
            total *= tl.load(rates + head)
        tl.store(d_decay + head, rounded(total, d_decay.dtype.element_ty))
    if SHARE:
        total = _total(shares, head, heads, batch, share_size, B).to(tl.float32)
        tl.store(d_share + head, rounded(total, d_share.dtype.element_ty))


def rates(decay: Tensor, batch: int, log: bool) -> Tensor:
    """γ of each of N = batch · heads rows, (N, 1, 1) fp32; ``log``: decay (H,) holds log γ."""
    number = batch * len(decay)
    made = decay.new_empty(number, 1, 1, dtype=torch.float32)
    with on(decay.device):
        put_rates[(triton.cdiv(number, 256),)](decay.contiguous(), made, number, len(decay), LOG=log, B=256)
    return made


def add_learned(
    decay: Tensor | None, rates: Tensor | None, decays: tuple[Tensor, Tensor] | None, share: Tensor | None,
    shares: Tensor | None, log: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of decay and share, (H,) each, of their parts: the near and far ones of γ, and of the share."""
    one = share if decay is None or decays is None else decay
    if one is None:
        return None, None
    near, far = decays or (one, one)
    d_decay = None if decay is None or decays is None else torch.empty_like(decay)
    d_share = None if share is None or shares is None else torch.empty_like(share)
    heads, batch = len(one), 1 if rates is None else len(rates) // len(one)
    if shares is not None:
        batch = len(shares)
    with on(one.device):
        add_parts_of_heads[(heads,)](
            near, far, pointer(shares, one), pointer(rates, one), pointer(d_decay, one), pointer(d_share, one), heads,
            batch, near.shape[-1], far.shape[-1], 1 if shares is None else shares.shape[-1], DECAY=d_decay is not None,
            SHARE=d_share is not None, LOG=log, B=256,
        )  # fmt: skip
    return d_decay, d_share


def combine(near: Part, far: Part, share: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor:
    """One result (B, H, L, e) of ``dtype``, the heads of a position side by side in memory.

    Args:
        near, far: out (N, L, e) and log-denominator (N, L, 1), N = B · H.
        share: (H,) log-factor of the far weights, or None.
    """
    number, length, width = near[0].shape
    heads = number // batch
    out = near[0].new_empty(batch, length, heads, width, dtype=dtype)
    with on(out.device):
        combine_rows[triton.cdiv(length, POSITIONS), number](
            *near, *far, pointer(share, out), out, length, heads, width, SHARE=share is not None, T=POSITIONS,
            E=padded(width),
        )  # fmt: skip
    return out.transpose(1, 2)


def combine_vjp(near: Part, far: Part, share: Tensor | None, dout: Tensor) -> tuple[Part, Part, Tensor | None]:
    """The gradients of near and far, and parts (B, H, ·) of the share's, from that of :func:`combine`'s result."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    batch, heads, length, width = dout.shape
    d_near, d_far = ((torch.empty_like(near[0]), torch.empty_like(near[1])) for _ in range(2))
    blocks = triton.cdiv(length, POSITIONS)
    d_share = None if share is None else near[0].new_empty(batch, heads, blocks)
    with on(dout.device):
        combine_rows_vjp[blocks, batch * heads](
            *near, *far, pointer(share, dout), dout, *d_near, *d_far, pointer(d_share, near[0]), length, heads, width,
            *dout.stride()[:3], SHARE=share is not None, T=POSITIONS, E=padded(width),
        )  # fmt: skip
    return d_near, d_far, d_share
