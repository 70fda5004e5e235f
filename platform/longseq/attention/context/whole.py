"""Bidirectional attention over slices: without positions that matter, one sum of all ranks' states is read by all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longseq.attention.backends import choice as backends
from longseq.attention.context.group import ContextGroup
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.first_order import Saved, first_order

if TYPE_CHECKING:
    from longseq.attention.backends.choice import Backend


def whole(
    backend: str,
    rows: tuple[Tensor, Tensor, Tensor],
    feature_map: FeatureMap,
    hidden: Tensor | None,
    context: ContextGroup,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks, (N, n, e). All ranks of the group call it."""
    return _Whole.apply(*rows, hidden, feature_map, backends.choose(backend, feature_map, rows), context)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        feature_map: FeatureMap,
        engine: Backend,
        context: ContextGroup,
    ) -> Tensor:
        out, kept = engine.bidirectional_forward(q, k, v, hidden, feature_map, context.total)
        ctx.feature_map, ctx.engine, ctx.context = feature_map, engine, context
        ctx.save_for_backward(q, k, v, hidden, out, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, out, *kept = saved
        rows, total = (q, k, v, hidden, ctx.feature_map), ctx.context.total
        return *ctx.engine.bidirectional_backward(*rows, total, out, kept, dout), None, None, None, None
