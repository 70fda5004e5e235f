"""Bidirectional FAVOR+ as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.backends.choice import choose
from longseq.attention.feature_maps import FeatureMap, from_parts
from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import MAP, operator, packed, summed, unpacked


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    hidden: Tensor | None = None,
    *,
    backend: str = "torch",
) -> Tensor:
    """Attention of each query over all keys that are not hidden.

    Args:
        q: (N, Lq, d), N = batch · heads, of any floating dtype.
        k: (N, L, d), same dtype.
        v: (N, L, e), same dtype.
        feature_map, hidden, backend: as of :func:`scan`.

    Returns:
        (N, Lq, e) in fp32 (float64); zeros where every key is hidden.
    """
    out: Tensor = torch.ops.longseq.bidirectional(q, k, v, hidden, *feature_map.parts(), backend)[0]
    return out


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float, backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    phi = from_parts(kind, weight, shift, log_constant)
    out, kept = choose(backend, phi, (q, k, v)).bidirectional_forward(q, k, v, hidden, phi, None)
    return out, packed(kept, out)


def _bidirectional_shapes(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float, backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    phi = from_parts(kind, weight, shift, log_constant)
    out = summed(v, *q.shape[:2], v.shape[2])
    return out, packed(choose(backend, phi, (q, k, v)).bidirectional_kept(q, k, v, phi), out)


def _bidirectional_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float, backend: str,
    out: Tensor, kept: list[Tensor], dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    phi = from_parts(kind, weight, shift, log_constant)
    engine = choose(backend, phi, (q, k, v))
    dq, dk, dv = engine.bidirectional_backward(q, k, v, hidden, phi, None, out, unpacked(kept), dout)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _bidirectional_backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float, backend: str,
    out: Tensor, kept: list[Tensor], dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, kept = _BIDIRECTIONAL(*args)
        kind, weight, shift, log_constant, backend = args[4:]
        ctx.numbers = kind, log_constant, backend
        ctx.save_for_backward(*args[:4], weight, shift, out, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # else zeros are made for what was kept
        return out, *kept

    @staticmethod
    def outputs(made: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        return made[0], list(made[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *rows, weight, shift, out = saved[:7]
        kind, log_constant, backend = ctx.numbers
        grads = _BIDIRECTIONAL_BACKWARD(*rows, kind, weight, shift, log_constant, backend, out, list(saved[7:]), dout)
        return *grads, *[None] * 6


_BOTH = f"Tensor q, Tensor k, Tensor v, Tensor? hidden, {MAP}, str backend"
_BIDIRECTIONAL = operator(
    f"bidirectional({_BOTH}) -> (Tensor, Tensor[])", _bidirectional, _bidirectional_shapes, _TwoPasses
)
_BIDIRECTIONAL_BACKWARD = operator(
    f"bidirectional_backward({_BOTH}, Tensor out, Tensor[] kept, Tensor dout) -> (Tensor, Tensor, Tensor)",
    _bidirectional_backward, _bidirectional_backward_shapes,
)  # fmt: skip
