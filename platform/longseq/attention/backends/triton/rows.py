"""Tiles of rows in Triton kernels: loaded, stored and multiplied.

Operands of a product have the inputs' dtype, and sums are fp32. But features, which go down to e^-40, and what is
multiplied with them are bf16 where the inputs are fp16, whose range they do not fit.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# Columns of fp32 rows multiplied at a time. All of a tile, split into its parts, would overflow the registers.
SLICE = tl.constexpr(32)


@triton.jit
def load_rows(base, rows, keep, width: tl.constexpr, first: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns ``first``… of rows of a matrix ``width`` wide; zeros where not to keep, and not even read there."""
    columns = first + tl.arange(0, COLUMNS)
    at = base + rows[:, None] * width + columns[None, :]
    if first + COLUMNS <= width:
        tile = tl.load(at, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=keep[:, None] & (columns < width)[None, :], other=0.0)
    return tile


# Where kernels are interpreted, bf16 needs help: tl.dot multiplies its bits as integers, and casts to it cut them off.
INTERPRETED = tl.constexpr(not isinstance(load_rows, triton.runtime.JITFunction))


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x in an operand's type, the nearest numbers."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def put_rows(base, rows, keep, width: tl.constexpr, values, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    at = base + rows[:, None] * width + columns[None, :]
    values = rounded(values, base.dtype.element_ty)
    if width == COLUMNS:
        tl.store(at, values, mask=keep[:, None])
    else:
        tl.store(at, values, mask=keep[:, None] & (columns < width)[None, :])


@triton.constexpr_function
def _parts():
    """Products that one of fp32 is the sum of, to a relative error of 1e-6: the interpreter multiplies in fp32.

    A single one of TF32 has an error of 5e-4, and an exponent of size 20 would turn it into 1 %. Three are as good as
    six of bf16, in more memory, which sm_90 has.
    """
    return "tf32x3" if cuda_capability_geq(9) and not cuda_capability_geq(10) else "bf16x6"


@triton.jit
def product(a, b, total=None):
    """a b [+ total] in fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    PART: tl.constexpr = _parts() if a.dtype == tl.float32 and not INTERPRETED else "ieee"
    return tl.dot(a, b, total, input_precision=PART)


@triton.jit
def sliced_product(a, a_rows, a_keep, b, b_rows, b_keep, width: tl.constexpr, WIDTH: tl.constexpr):
    """Products of fp32 rows of two matrices, (len(a_rows), len(b_rows)), a slice of their columns at a time."""
    STEP: tl.constexpr = WIDTH if WIDTH < SLICE else SLICE
    total = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for first in tl.static_range(0, WIDTH, STEP):
        part = load_rows(a, a_rows, a_keep, width, first, STEP)
        total = product(part, tl.trans(load_rows(b, b_rows, b_keep, width, first, STEP)), total)
    return total
