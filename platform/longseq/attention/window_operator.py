"""Exact attention inside a sliding window as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.backends.choice import choose
from longseq.attention.feature_maps import FeatureMap, from_parts
from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import ROWS, operator, summed
from longseq.attention.parts import Part


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool,
    hidden: Tensor | None = None,
    runs: Tensor | None = None,
    decay: Tensor | None = None,
    backend: str = "torch",
    beyond: FeatureMap | None = None,
) -> Part:
    """Softmax attention over the keys less than ``window`` positions away.

    Args:
        q, k, v, hidden, runs, decay, backend: as of :func:`scan`.
        window: query i sees keys j with 0 ≤ i − j < window (causal) or |i − j| < window.
        causal: keys of later positions are not seen.
        beyond: the feature map of the keys outside, so that both are computed by one backend.

    Returns:
        out (N, L, e) and lse (N, L, 1). A query that sees no key gets zeros and −1e30.
    """
    kind, features = ("", 0) if beyond is None else (beyond.parts()[0], beyond.features)
    out, lse = torch.ops.longseq.window(q, k, v, decay, hidden, runs, window, causal, kind, features, backend)
    return out, lse


def _beyond(kind: str, features: int, like: Tensor) -> FeatureMap | None:
    """A map of that kind and size, for the choice of a backend."""
    return from_parts(kind, summed(like, features, 0), None, 0.0) if kind else None


def _window(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    window: int, causal: bool, kind: str, features: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    engine = choose(backend, _beyond(kind, features, q), (q, k, v))
    return engine.window_forward(q, k, v, decay, hidden, runs, window, causal)


def _window_shapes(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    window: int, causal: bool, kind: str, features: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return summed(v, *v.shape), summed(v, *v.shape[:2], 1)


def _window_backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    window: int, causal: bool, kind: str, features: int, backend: str,
    out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None, wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    engine = choose(backend, _beyond(kind, features, q), (q, k, v))
    dq, dk, dv, found = engine.window_backward(
        q, k, v, decay, hidden, runs, window, causal, out, lse, dout, dlse, wants_decay
    )
    d_decay = out.new_empty(0) if found is None or decay is None else found.to(decay)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_decay


def _window_backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    window: int, causal: bool, kind: str, features: int, backend: str,
    out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None, wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, decay.new_empty(decay.shape) if decay is not None and wants_decay else out.new_empty(0)


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _WINDOW(*args)
        ctx.numbers = args[6:]
        ctx.save_for_backward(*args[:6], out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def outputs(made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return made

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *rows, out, lse = saved
        wants_decay = ctx.needs_input_grad[3]
        dq, dk, dv, d_decay = _WINDOW_BACKWARD(*rows, *ctx.numbers, out, lse, dout, dlse, wants_decay)
        return dq, dk, dv, d_decay if wants_decay else None, *[None] * 7


_BAND = "SymInt window, bool causal, str kind, SymInt features, str backend"
_WINDOW = operator(f"window({ROWS}, {_BAND}) -> (Tensor, Tensor)", _window, _window_shapes, _Window)
_WINDOW_BACKWARD = operator(
    f"window_backward({ROWS}, {_BAND}, Tensor out, Tensor lse, Tensor? dout, Tensor? dlse, bool wants_decay)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _window_backward, _window_backward_shapes,
)  # fmt: skip
