"""Causal attention with a window on GPUs: near and far keys in one autograd function of few kernels.

What :mod:`longseq.attention.window_operator`, :mod:`longseq.attention.scan_operator` and
:mod:`longseq.attention.parts` compute one after the other. As one function, the gradients of both parts need not be
added up, and the result is laid out where it is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.backends.choice import choose, name_of
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.first_order import Saved, first_order
from longseq.attention.fused import fuses
from longseq.attention.scan import Rows


def takes(backend: str, phi: FeatureMap | None, rows: tuple[Tensor, Tensor, Tensor], window: int) -> bool:
    """Whether :func:`near_and_far` computes this: both parts by Triton kernels, and no compiler reads along."""
    if phi is None or not 0 < window < rows[0].shape[1] or not fuses(rows[0], backend):
        return False
    return name_of(choose(backend, phi, rows)) == "triton"


def near_and_far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: FeatureMap,
    window: int,
    hidden: Tensor | None,
    runs: Tensor | None,
    decay: Tensor | None,
    share: Tensor | None,
    batch: int,
    dtype: torch.dtype,
) -> Tensor:
    """Keys less than ``window`` positions back exactly, those before by features.

    Args:
        q, k, v, hidden, runs, decay: as of :func:`longseq.attention.scan_operator.scan`.
        share: (heads,) log-factor of the weights beyond the window, or None.
        batch: B of N = B · H rows.
        dtype: of the result.

    Returns:
        (B, H, L, e), laid out as (B, L, H, e).
    """
    made: Tensor = _NearAndFar.apply(q, k, v, decay, share, hidden, runs, phi, window, batch, dtype)
    return made


class _NearAndFar(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, share: Tensor | None, hidden: Tensor | None,
        runs: Tensor | None, phi: FeatureMap, window: int, batch: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        from longseq.attention.backends.triton import parts as triton_parts
        from longseq.attention.backends.triton import scan as triton_backend
        from longseq.attention.backends.triton import window as triton_window

        near = triton_window.window_forward(q, k, v, decay, hidden, runs, window, True)
        rows = Rows(q, k, v, decay, hidden, runs, phi, window)
        far = triton_backend.scan_forward(rows, None, True, handed_on=False)
        ctx.phi, ctx.window = phi, window
        ctx.save_for_backward(q, k, v, decay, share, hidden, runs, *near, far.out, far.lse, far.inverse_den, *far.kept)
        return triton_parts.combine(near, (far.out, far.lse), share, batch, dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        from longseq.attention.backends.triton import parts as triton_parts
        from longseq.attention.backends.triton import scan as triton_backend
        from longseq.attention.backends.triton import window as triton_window

        q, k, v, decay, share, hidden, runs, near, near_lse, far, far_lse, inverse_den, *kept = saved
        assert q is not None
        assert k is not None
        assert v is not None
        assert near is not None
        assert near_lse is not None
        assert far is not None
        assert far_lse is not None
        assert inverse_den is not None
        wants_decay = ctx.needs_input_grad[3]
        d_near, d_far, d_share = triton_parts.combine_vjp((near, near_lse), (far, far_lse), share, grad)
        rows = Rows(q, k, v, decay, hidden, runs, ctx.phi, ctx.window)
        grads = triton_backend.scan_backward(rows, far, inverse_den, kept, *d_far, None, wants_decay)
        dq, dk, dv, d_decay = triton_window.window_backward(
            q, k, v, decay, hidden, runs, ctx.window, True, near, near_lse, *d_near, wants_decay,
            onto=(grads.q, grads.k, grads.v),
        )  # fmt: skip
        if d_decay is not None and grads.decay is not None and decay is not None:
            d_decay = (d_decay + grads.decay).to(decay.dtype)
        return dq, dk, dv, d_decay, d_share, *[None] * 6
