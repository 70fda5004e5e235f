"""Causal attention with a window on GPUs: near and far keys in one autograd function of few kernels.

What :mod:`longseq.attention.operations` and :mod:`longseq.attention.parts` compute one after the other. As one
function, the gradients of both parts need not be added up, and the result is laid out where it is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.backends.choice import choose, name_of
from longseq.attention.call import Call, per_row
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.first_order import Saved, first_order
from longseq.attention.fused import fuses
from longseq.attention.scan import Rows


def takes(backend: str, rows: Rows) -> bool:
    """Whether :func:`near_and_far` computes this: both parts by Triton kernels, and no compiler reads along."""
    if rows.phi is None or not 0 < rows.delay < rows.q.shape[1] or not fuses(rows.q, backend):
        return False
    return name_of(choose(backend, rows.phi, rows.qkv)) == "triton"


def near_and_far(rows: Rows, call: Call, batch: int, dtype: torch.dtype) -> Tensor:
    """Keys less than ``rows.delay`` positions back exactly, those before by features.

    Args:
        rows: without the decay.
        call: whose decay and far share it is.
        batch: B of N = B · H rows.
        dtype: of the result.

    Returns:
        (B, H, L, e), laid out as (B, L, H, e).
    """
    tensors = *rows.qkv, call.decay, rows.gate, call.far_share, rows.hidden, rows.runs
    made: Tensor = _NearAndFar.apply(*tensors, rows.feature_map, rows.delay, batch, dtype, call.log_decay)
    return made


def rates_of_rows(call: Call, batch: int, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """γ of each of N = batch · heads rows, (N, 1, 1): on a GPU one kernel, and one backward."""
    if call.decay is None or dtype != torch.float32 or not fuses(q, call.options.backend):
        return per_row(call.rates, batch, dtype)
    made: Tensor = _Rates.apply(call.decay, batch, call.log_decay)
    return made


class _Rates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, batch: int, log_decay: bool) -> Tensor:
        from longseq.attention.backends.triton import parts

        rates = parts.rates(decay, batch, log_decay)
        ctx.log_decay = log_decay
        ctx.save_for_backward(decay, rates)
        return rates

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        from longseq.attention.backends.triton import parts

        decay, rates = saved
        whole = grad.contiguous().flatten(1)
        return parts.add_learned(decay, rates, (whole, whole[:, :0]), None, None, ctx.log_decay)[0], None, None


class _NearAndFar(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, gate: Tensor | None, share: Tensor | None,
        hidden: Tensor | None, runs: Tensor | None, phi: FeatureMap, window: int, batch: int, dtype: torch.dtype,
        log_decay: bool,
    ) -> Tensor:  # fmt: skip
        from longseq.attention.backends.triton import parts, scan
        from longseq.attention.backends.triton import window as triton_window

        rates = None if decay is None else parts.rates(decay, batch, log_decay)
        rows = Rows(q, k, v, rates, hidden, runs, phi, window, gate)
        near = triton_window.window_forward(rows, window, True)
        far = scan.scan_forward(rows, None, True, handed_on=False)
        ctx.phi, ctx.window, ctx.log_decay = phi, window, log_decay
        learned = decay, rates, gate, share
        ctx.save_for_backward(q, k, v, *learned, hidden, runs, *near, far.out, far.lse, far.inverse_den, *far.kept)
        return parts.combine(near, (far.out, far.lse), share, batch, dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        from longseq.attention.backends.triton import parts, scan
        from longseq.attention.backends.triton import window as triton_window

        q, k, v, decay, rates, gate, share, hidden, runs, *made = saved
        near, far, inverse_den, kept = (made[0], made[1]), (made[2], made[3]), made[4], made[5:]
        rows = Rows(q, k, v, rates, hidden, runs, ctx.phi, ctx.window, gate)
        wants_decay = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        d_near, d_far, d_share = parts.combine_vjp(near, far, share, grad)
        found = scan.scan_backward(rows, far[0], inverse_den, kept, *d_far, None, wants_decay, parts=True)
        onto = found.q, found.k, found.v
        whole = triton_window.window_backward(
            rows, ctx.window, True, *near, *d_near, wants_decay, onto=onto, parts=True
        )
        both = None if whole.decay is None or found.decay is None else (whole.decay, found.decay)
        d_gate = None if gate is None or both is None else both[0] + both[1]
        d_decay, d_share = parts.add_learned(decay, rates, both, share, d_share, ctx.log_decay)
        return whole.q, whole.k, whole.v, d_decay, d_gate, d_share, *[None] * 7
