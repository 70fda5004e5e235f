"""From one linear map's result to the heads' queries, keys and values, turned to their positions; and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.first_order import Saved, first_order
from longseq.attention.fused import fuses
from longseq.attention.rotary import rotate


def split_heads(
    qkv: Tensor, heads: int, rotary: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, L, D) of qkv (B, L, 3E), queries and keys rotated by a table if there is one.

    On a GPU it is one kernel, forward and backward, which writes what attention reads as it lies in memory.
    """
    if fuses(qkv, backend) and qkv.shape[-1] % (6 * heads) == 0 and qkv.numel():
        return _Heads.apply(qkv, heads, rotary)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return q, k, v


def lay_out(out: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Attention's result (B·H, L, e) as (B, H, L, e) of ``dtype``.

    Where it is rounded it is laid out as the output's linear map reads it, the heads of a position side by side: one
    pass over it instead of two, and backward as well.
    """
    if out.dtype == dtype or torch.compiler.is_compiling():
        return out.unflatten(0, (batch, -1)).to(dtype)
    return _Rounded.apply(out, batch, dtype)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, rotary: Tensor | None) -> tuple[Tensor, ...]:
        from longseq.attention import triton_heads

        ctx.save_for_backward(rotary)
        return triton_heads.apart(qkv.contiguous(), heads, rotary)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from longseq.attention import triton_heads

        q, k, v = grads
        return triton_heads.together(q, k, v, saved[0]), None, None


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        number, length, width = out.shape
        ctx.dtype = out.dtype
        laid = out.new_empty(batch, length, number // batch, width, dtype=dtype).transpose(1, 2)
        return laid.copy_(out.view(batch, -1, length, width))

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = torch.empty(grad.shape, dtype=ctx.dtype, device=grad.device)
        return rows.copy_(grad).flatten(0, 1), None, None
