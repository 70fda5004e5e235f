"""Norms, together with the addition of a residual branch in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longseq.attention.first_order import Saved, first_order
from longseq.attention.fused import fuses

WIDEST = 16384  # a row is in the registers of one program


def norm(width: int, eps: float, kind: str = "layernorm", bias: bool = True, backend: str = "auto") -> Norm | RMSNorm:
    """The norm of a block: layernorm, or rmsnorm (Zhang & Sennrich 2019, arXiv 1910.07467), which has no bias."""
    return RMSNorm(width, eps) if kind == "rmsnorm" else Norm(width, eps, backend, bias)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last axis, which can add a branch first and hand the sum on, as :class:`Norm`."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None, *, sums: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :meth:`Norm.forward`."""
        total = x if branch is None else x + branch
        # On a CPU torch's is made of six operations, each of which keeps something.
        if total.device.type == "cpu" and not torch.compiler.is_compiling():
            normed = _RMSNorm.apply(total, self.weight, self.eps)
        else:
            normed = super().forward(total)
        return (total, normed) if sums or branch is not None else normed


class Norm(nn.LayerNorm):
    """nn.LayerNorm over the last axis, which can add a branch first and hand the sum on.

    On a GPU that is one kernel forward and two backward; under autocast it gives what linear maps read, rounded to
    their dtype, where PyTorch's gives fp32 for a cast to come.
    """

    def __init__(self, width: int, eps: float, backend: str = "auto", bias: bool = True):
        super().__init__(width, eps=eps, bias=bias)
        self.backend = backend

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None, *, sums: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x), with ``sums`` (x, norm(x)); or, with a branch, (x + branch, norm(x + branch)).

        x and branch: (..., E) of any floating dtypes; the sum has the wider one.
        """
        if not (fuses(x, self.backend) and self._fits(x, branch)):
            total = x if branch is None else x + branch
            normed = super().forward(total)
            return (total, normed) if sums or branch is not None else normed
        kind = x.device.type
        total, normed = _Norm.apply(
            x,
            branch,
            self.weight,
            self.bias,
            self.eps,
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )
        return (total, normed) if sums or branch is not None else normed

    def _fits(self, x: Tensor, branch: Tensor | None) -> bool:
        """Whether a kernel, which looks at no shapes, can read these; PyTorch refuses what does not match."""
        fits = (x.shape[-1],) == self.normalized_shape and x.shape[-1] <= WIDEST and x.numel() > 0
        fits = fits and self.bias is not None
        return fits and (branch is None or branch.shape == x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        from longseq.models import triton_norm

        total, normed, mean, scale = triton_norm.add_and_norm(x, branch, weight, bias, eps, dtype)
        ctx.save_for_backward(total, mean, scale, weight, bias)
        ctx.branch = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        from longseq.models import triton_norm

        total, mean, scale, weight, bias = saved
        if d_normed is None:
            d_branch = None if d_total is None or ctx.branch is None else d_total.to(ctx.branch)
            return d_total, d_branch, None, None, None, None
        dx, d_branch, d_weight, d_bias = triton_norm.vjp(
            d_total, d_normed, total, mean, scale, weight, bias, ctx.branch
        )
        return dx, d_branch, d_weight, d_bias, None, None


class _RMSNorm(torch.autograd.Function):
    """x · s · weight, s = (mean x² + eps)^−1/2, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = saved
        unit, grad = _wide(x) * scale, _wide(grad)
        products = grad * unit
        d_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        inner = products.mul_(weight).mean(-1, keepdim=True)
        dx = (grad * weight).sub_(unit.mul_(inner)).mul_(scale)
        return dx.to(x.dtype), d_weight, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
