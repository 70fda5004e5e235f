"""From one linear map's result to the heads' queries, keys and values, turned to their positions; and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.first_order import Saved, first_order
from longseq.attention.fused import MOST_ROWS, fuses
from longseq.attention.rotary import rotate


def split_heads(
    qkv: Tensor,
    heads: int,
    rotary: Tensor | None = None,
    log_temperature: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, L, D) of qkv (B, L, 3E), queries and keys rotated by a table if there is one.

    With log τ, (H, 1, 1), queries and keys first get the length τ^1/2 · D^1/4. On a GPU all of it is one kernel,
    forward and backward, which writes what attention reads as it lies in memory.
    """
    if fuses(qkv, backend) and _fits(qkv, heads, rotary):  # a compiler is to guard no sizes
        made = _Heads.apply(qkv, heads, rotary, log_temperature)
        return made[0], made[1], made[2]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    if log_temperature is not None:
        scale = torch.exp(0.5 * log_temperature) * q.shape[-1] ** 0.25
        q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) * scale for t in (q, k))
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return q.to(v.dtype), k.to(v.dtype), v


def _fits(qkv: Tensor, heads: int, rotary: Tensor | None) -> bool:
    """Whether a kernel, which looks at no shapes, can read these; PyTorch's operations refuse what does not match."""
    batch, length, width = qkv.shape
    if width % (6 * heads) or not qkv.numel() or batch * heads > MOST_ROWS:
        return False
    angles = length, width // (6 * heads)
    return rotary is None or rotary.shape in ((2, *angles), (2, 1, 1, *angles), (2, batch, 1, *angles))


def lay_out(out: Tensor, batch: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Attention's result (B·H, L, e) as (B, H, L, e) of ``dtype``.

    Where it is rounded it is laid out as the output's linear map reads it, the heads of a position side by side: one
    pass over it instead of two, and backward as well.
    """
    if out.dtype == dtype or torch.compiler.is_compiling():
        made: Tensor = out.unflatten(0, (batch, heads)).to(dtype)
        return made
    rounded: Tensor = _Rounded.apply(out, batch, heads, dtype)
    return rounded


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, rotary: Tensor | None, log_temperature: Tensor | None
    ) -> tuple[Tensor, ...]:
        from longseq.attention.backends.triton import heads as triton_heads

        q, k, v, lengths = triton_heads.apart(qkv.contiguous(), heads, rotary, log_temperature)
        # Attention keeps q and k itself.
        normalised = (None, None, None) if lengths is None else (q, k, lengths)
        ctx.save_for_backward(rotary, log_temperature, *normalised)
        return q, k, v

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from longseq.attention.backends.triton import heads as triton_heads

        dq, dk, dv = grads
        d_qkv, d_log_temperature = triton_heads.together(dq, dk, dv, *saved)
        return d_qkv, None, None, d_log_temperature


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, batch: int, heads: int, dtype: torch.dtype) -> Tensor:
        _, length, width = out.shape
        ctx.dtype = out.dtype
        laid = out.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)
        return laid.copy_(out.unflatten(0, (batch, heads)))

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = torch.empty(grad.shape, dtype=ctx.dtype, device=grad.device)
        return rows.copy_(grad).flatten(0, 1), None, None, None
