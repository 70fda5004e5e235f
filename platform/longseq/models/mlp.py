"""The MLPs of a block: two linear maps with an activation between them, or SwiGLU's three."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention.first_order import Saved, first_order
from longseq.attention.narrow import Linear


def mlp(dim: int, hidden: int, kind: str, bias: bool) -> nn.Sequential:
    """An MLP (..., dim) to (..., dim), of ``hidden`` units.

    Args:
        kind: gelu; swiglu, (x W₁) · silu(x W₂) (Shazeer 2020, arXiv 2002.05202), W₁ and W₂ as one map; or relu2, the
            square of a ReLU (So et al. 2021, arXiv 2109.08668).
        bias: whether the linear maps have biases.
    """
    wide = 2 * hidden if kind == "swiglu" else hidden
    return nn.Sequential(Linear(dim, wide, bias=bias), _ACTIVATIONS[kind](), Linear(hidden, dim, bias=bias))


class SwiGLU(nn.Module):
    """(..., 2n) to (..., n): the first half times silu of the second."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            value, gate = x.chunk(2, dim=-1)
            return value * F.silu(gate)
        return _Gated.apply(x)


class SquaredReLU(nn.Module):
    """max(x, 0)²."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.relu(x).square()
        return _Squared.apply(x)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "swiglu": SwiGLU, "relu2": SquaredReLU}


class _Gated(torch.autograd.Function):
    """Written out because autograd's keeps silu of the gate besides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor]:
        value, gate = saved[0].chunk(2, dim=-1)
        dx = torch.empty_like(saved[0])
        d_value, d_gate = dx.chunk(2, dim=-1)
        d_value.copy_(F.silu(gate).mul_(grad))
        d_gate.copy_(torch.ops.aten.silu_backward(grad * value, gate))
        return (dx,)


class _Squared(torch.autograd.Function):
    """The same: autograd's keeps the ReLU besides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor]:
        return (F.relu(saved[0]).mul_(2).mul_(grad),)
