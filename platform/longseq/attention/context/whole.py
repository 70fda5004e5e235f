"""Bidirectional attention over slices: without positions that matter, one sum of all ranks' states is read by all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longseq.attention.backends import choice as backends
from longseq.attention.context.group import ContextGroup
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.first_order import Saved, first_order
from longseq.attention.scan import Rows

if TYPE_CHECKING:
    from longseq.attention.backends.choice import Backend


def whole(backend: str, rows: Rows, context: ContextGroup) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks, (N, n, e). All ranks of the group call it."""
    phi = rows.feature_map
    made: Tensor = _Whole.apply(*rows.qkv, rows.hidden, phi, backends.choose(backend, phi, rows.qkv), context)
    return made


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, phi: FeatureMap, engine: Backend,
        context: ContextGroup,
    ) -> Tensor:  # fmt: skip
        out, kept = engine.bidirectional_forward(Rows(q, k, v, hidden=hidden, phi=phi), context.total)
        ctx.phi, ctx.engine, ctx.context = phi, engine, context
        ctx.save_for_backward(q, k, v, hidden, out, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, out, *kept = saved
        rows = Rows(q, k, v, hidden=hidden, phi=ctx.phi)
        found = ctx.engine.bidirectional_backward(rows, ctx.context.total, out, kept, dout)
        return found.q, found.k, found.v, None, None, None, None
