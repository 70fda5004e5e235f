"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.first_order import Saved, first_order


def rotary_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of the rotary angles of integer positions (..., L): (2, ..., L, D/2) fp32.

    Pair i of D/2 turns by position · base^(−2i/D). Queries match keys by content only in pairs that hardly turn between
    them. At the usual base no pair does beyond some 10,000 positions: long contexts need a larger one (Xiong et al.
    2023, arXiv 2309.16039). The angles are computed in float64: in fp32 they are off by 0.02 at a million positions.
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[..., None].double() * frequencies
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys to their positions, in fp32.

    Args:
        x: (B, H, L, D), D even.
        table: (2, L, D/2) from :func:`rotary_table`, or (2, B, 1, L, D/2) where each row has its own positions.

    Returns:
        Rotated tensor, same shape and dtype. Norms are unchanged.
    """
    if torch.compiler.is_compiling():  # a compiler makes one pass of the plain formula
        cos, sin = table
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    made: Tensor = _Rotation.apply(x, *table)
    return made


class _Rotation(torch.autograd.Function):
    """Written out because autograd's version makes six times as many passes; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = saved
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """[a cos − b sin, a sin + b cos] for x = [a, b]; the angles times ``direction`` (±1)."""
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    first, second = turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=direction)
    return turned.to(x.dtype)
