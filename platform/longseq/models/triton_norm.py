"""Addition and layer norm by Triton kernels, forward and backward.

n = (s − mean) · r of the sum s = x + y, r = (var + eps)^-1/2; out = n · w + b. Of dout = g and the sum's own gradient:
ds += r · (g w − mean(g w) − n · mean(g w n)), dw = Σ g n, db = Σ g. All in fp32, rounded once.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longseq.attention.backends.triton.launch import on, pointer
from longseq.attention.backends.triton.rows import load_rows, put_rows, rounded

TILE = 4096  # numbers that a program has in registers of each matrix
PROGRAMS = 528  # of the backward pass, four for each multiprocessor of an H200; each sums dw and db over its rows


@triton.jit
def _vector(x, width, E: tl.constexpr):
    columns = tl.arange(0, E)
    return tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=("number",))
def norm_rows(
    x, y, weight, bias, total, out, means, scales, number, width: tl.constexpr, eps,
    ADDS: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """R rows: the sum, its norm, and the mean and r of each."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    real = rows < number
    s = load_rows(x, rows, real, width, 0, E).to(tl.float32)
    if ADDS:
        s = rounded(s + load_rows(y, rows, real, width, 0, E).to(tl.float32), total.dtype.element_ty)
        put_rows(total, rows, real, width, s, E)
        s = s.to(tl.float32)
    mean = tl.sum(s, 1) / width
    centred = tl.where((tl.arange(0, E) < width)[None, :], s - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(means + rows, mean, mask=real)
    tl.store(scales + rows, scale, mask=real)
    put_rows(out, rows, real, width, centred * scale[:, None] * _vector(weight, width, E) + _vector(bias, width, E), E)


@triton.jit(do_not_specialize=("number",))
def norm_rows_vjp(
    d_total, d_out, total, means, scales, weight, dx, dy, parts, number, width: tl.constexpr,
    SUMS: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """ds of every so many rows, as dx and, with SPLIT, as dy of another dtype; this program's part of dw and db."""
    columns = tl.arange(0, E)
    w = _vector(weight, width, E)
    dw, db = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(number, R), tl.num_programs(0)):
        rows = (block * R + tl.arange(0, R)).to(tl.int64)
        real = rows < number
        mean, scale = tl.load(means + rows, mask=real, other=0.0), tl.load(scales + rows, mask=real, other=0.0)
        s = load_rows(total, rows, real, width, 0, E).to(tl.float32)
        n = tl.where((columns < width)[None, :], (s - mean[:, None]) * scale[:, None], 0.0)
        g = load_rows(d_out, rows, real, width, 0, E).to(tl.float32)
        dw += tl.sum(g * n, 0)
        db += tl.sum(g, 0)
        g *= w
        g -= (tl.sum(g, 1) / width)[:, None] + n * (tl.sum(g * n, 1) / width)[:, None]
        ds = g * scale[:, None]
        if SUMS:
            ds += load_rows(d_total, rows, real, width, 0, E).to(tl.float32)
        put_rows(dx, rows, real, width, ds, E)
        if SPLIT:
            put_rows(dy, rows, real, width, ds, E)
    at = parts + tl.program_id(0) * 2 * width + columns
    tl.store(at, dw, mask=columns < width)
    tl.store(at + width, db, mask=columns < width)


@triton.jit(do_not_specialize=("number",))
def add_parts(parts, dw, db, number, width, B: tl.constexpr, E: tl.constexpr):
    """E columns of dw or db: the sum of the parts."""
    columns = tl.program_id(0) * E + tl.arange(0, E)
    which = tl.program_id(1)
    total = tl.zeros((B, E), tl.float32)
    for first in range(0, number, B):
        rows = first + tl.arange(0, B)
        keep = (rows < number)[:, None] & (columns < width)[None, :]
        total += tl.load(parts + (rows[:, None] * 2 + which) * width + columns[None, :], mask=keep, other=0.0)
    to = db if which else dw
    tl.store(to + columns, rounded(tl.sum(total, 0), dw.dtype.element_ty), mask=columns < width)


def add_and_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, x itself without a branch; its norm, of ``dtype`` or the sum's; and fp32 mean and r of each row."""
    x = x.contiguous()
    total = x
    if branch is not None:
        branch = branch.contiguous()
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    out = total.new_empty(x.shape, dtype=dtype or total.dtype)
    width, number = x.shape[-1], x.numel() // x.shape[-1]
    mean, scale = (x.new_empty(number, dtype=torch.float32) for _ in range(2))
    columns, rows, warps = _tile(width)
    with on(x.device):
        norm_rows[(triton.cdiv(number, rows),)](
            x, pointer(branch, x), weight, bias, total, out, mean, scale, number, width, eps,
            ADDS=branch is not None, R=rows, E=columns, num_warps=warps,
        )  # fmt: skip
    return total, out, mean, scale


def vjp(
    d_total: Tensor | None, d_out: Tensor, total: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor,
    branch: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of the branch in its dtype, of weight and bias."""
    d_out = d_out.contiguous()
    d_total = None if d_total is None else d_total.contiguous()
    dx = torch.empty_like(total)
    split = branch is not None and branch != total.dtype
    dy = torch.empty_like(total, dtype=branch) if split else dx
    width, number = total.shape[-1], len(mean)
    columns, rows, warps = _tile(width)
    programs = min(PROGRAMS, triton.cdiv(number, rows))
    parts = total.new_empty(programs, 2, width, dtype=torch.float32)
    dw, db = torch.empty_like(weight), torch.empty_like(bias)
    with on(total.device):
        norm_rows_vjp[(programs,)](
            pointer(d_total, d_out), d_out, total, mean, scale, weight, dx, dy, parts, number, width,
            SUMS=d_total is not None, SPLIT=split, R=rows, E=columns, num_warps=warps,
        )  # fmt: skip
        add_parts[triton.cdiv(width, 32), 2](parts, dw, db, programs, width, B=64, E=32)
    return dx, None if branch is None else dy, dw, db


def _tile(width: int) -> tuple[int, int, int]:
    """Columns and rows of a tile, and how many warps share it."""
    columns = max(16, triton.next_power_of_2(width))
    return columns, max(1, TILE // columns), 4 if columns <= TILE else 8
