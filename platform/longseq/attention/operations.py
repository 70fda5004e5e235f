"""Attention's three operations, each one autograd function for all backends: scan, window and keys on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longseq.attention.backends.choice import Backend, choose
from longseq.attention.feature_maps import from_parts
from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import operator
from longseq.attention.parts import Part
from longseq.attention.scan import Gradients, Rows
from longseq.attention.state import AttentionState

Maybe = Tensor | None

# What all operations are given: rows (N, L, ·), a feature map by its parts, or no kind, and a backend by name. A decay
# is (N, 1, 1), or a gate's sums (N, L + 1, 1).
_ROWS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? hidden, Tensor? runs, "
    "str kind, Tensor? weight, Tensor? shift, float log_constant, str backend"
)
_COUNT = 11
_NO_MAP = "", None, None, 0.0


def scan(rows: Rows, backend: str = "torch", state: AttentionState | None = None) -> Part:
    """Attention of query i over the keys j ≤ i − delay, by features: see :mod:`longseq.attention.scan`.

    state: of the keys before, as of :func:`carried_scan`.

    Returns:
        out (N, L, e) and lse (N, L, 1), the log of the denominator, in fp32 (float64). A query that sees no
        key gets zeros and −1e30.
    """
    before = (None, None) if state is None else (state.sums, state.log_scale)
    learns = _learns(*rows.qkv, rows.fading, before[0])
    done = torch.ops.longseq.scan(*_given(rows, backend), rows.delay, False, learns, *before)
    return done[0], done[1]


def carried_scan(
    rows: Rows, state: AttentionState | None, backend: str = "torch"
) -> tuple[Tensor, Tensor, AttentionState]:
    """:func:`scan` over the next tile of a sequence, whose earlier keys are in ``state``; and the state behind it.

    A state is as seen from the first key of the next tile's scan, ``delay`` positions before its first query. The
    gradient goes through its sums. No key is hidden, and all are of one document.
    """
    before = (None, None) if state is None else (state.sums, state.log_scale)
    learns = _learns(*rows.qkv, rows.fading, before[0])
    done = torch.ops.longseq.scan(*_given(rows, backend), rows.delay, True, learns, *before)
    out, lse, behind, scale, _ = done
    return out, lse, AttentionState(behind, scale)


def window_attention(rows: Rows, window: int, causal: bool, backend: str = "torch") -> Part:
    """Softmax attention over the keys less than ``window`` positions away: 0 ≤ i − j < window if causal.

    A feature map of the rows is that of the keys outside, so that both are computed by one backend.

    Returns:
        As :func:`scan`.
    """
    out, lse, _ = torch.ops.longseq.window(*_given(rows, backend), window, causal)
    return out, lse


def bidirectional_attention(rows: Rows, backend: str = "torch") -> Tensor:
    """Attention of each query, (N, Lq, ·), over all keys that are not hidden, by features.

    Returns:
        (N, Lq, e) in fp32 (float64); zeros where every key is hidden.
    """
    out: Tensor = torch.ops.longseq.bidirectional(*_given(rows, backend))[0]
    return out


def _given(rows: Rows, backend: str) -> tuple[Any, ...]:
    phi = _NO_MAP if rows.phi is None else rows.phi.parts()
    return *rows.qkv, rows.fading, rows.hidden, rows.runs, *phi, backend


def _taken(args: Sequence[Any]) -> tuple[Backend, Rows, Sequence[Any]]:
    """What :func:`_given` gave, and what came behind it."""
    q, k, v, decay, hidden, runs, kind, weight, shift, log_constant, backend = args[:_COUNT]
    phi = from_parts(kind, weight, shift, log_constant) if kind else None
    rows = Rows(q, k, v, None, hidden, runs, phi).faded_by(decay)
    return choose(backend, phi, rows.qkv), rows, args[_COUNT:]


def _learns(*tensors: Maybe) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _summed(x: Tensor, *shape: int) -> Tensor:
    """Empty, in the dtype of sums."""
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _packed(tensors: Sequence[Maybe], like: Tensor) -> list[Tensor]:
    """A list that an operator may return: it holds tensors only."""
    return [like.new_empty(0) if x is None else x for x in tensors]


def _unpacked(tensors: Sequence[Tensor]) -> list[Maybe]:
    return [None if x.shape == (0,) else x for x in tensors]


@dataclass(frozen=True)
class _Operation:
    """An operation as two operators and the autograd function between them.

    Attributes:
        name: torch.ops.longseq's.
        more: of its schema, behind the rows.
        state: and behind that, a state's sums and their log-scale, if it begins with one.
        forward: (backend, rows, *more, *state) to its results, and last what the backward pass needs.
        shapes: the same of tensors without data.
        backward: (backend, rows, *more, saved results and ``kept``, gradients, whether the decay's is wanted).
        saved: so many of the results are needed by it as well.
        differentiable: so many of the results have gradients.
    """

    name: str
    more: str
    state: str
    results: int
    forward: Callable[..., tuple[Any, ...]]
    shapes: Callable[..., tuple[Any, ...]]
    backward: Callable[..., Gradients]
    saved: int
    differentiable: int

    def define(self) -> None:
        results = ", ".join(["Tensor"] * self.results)
        backward = f"{self.name}_backward({_ROWS}{self.more}, Tensor[] saved, Tensor?[] grads, bool wants_decay)"
        made = operator(f"{backward} -> (Tensor, Tensor, Tensor, Tensor, Tensor)", self._back, self._back_shapes)
        forward = f"{self.name}({_ROWS}{self.more}{self.state}) -> ({results}, Tensor[])"

        def differentiable(operator: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            flat = _Differentiated.apply(self, operator, made, *args)
            return *flat[: self.results], list(flat[self.results :])

        operator(forward, self._there, self._there_shapes, differentiable)

    def _there(self, *args: Any) -> tuple[Any, ...]:
        engine, rows, more = _taken(args)
        *results, kept = self.forward(engine, rows, *more)
        return *results, _packed(kept, results[0])

    def _there_shapes(self, *args: Any) -> tuple[Any, ...]:
        engine, rows, more = _taken(args)
        *results, kept = self.shapes(engine, rows, *more)
        return *results, _packed(kept, results[0])

    def _back(self, *args: Any) -> tuple[Tensor, ...]:
        engine, rows, (*more, saved, grads, wants_decay) = _taken(args)
        found = self.backward(engine, rows, *more, _unpacked(saved), grads, wants_decay)
        nothing = saved[0].new_empty(0)
        d_decay = found.decay if wants_decay and rows.fading is not None else None
        d_decay = nothing if d_decay is None else d_decay.to(rows.fading)
        dq, dk, dv = (x.to(of.dtype) for x, of in zip((found.q, found.k, found.v), rows.qkv, strict=True))
        d_initial = saved[0].new_empty(0) if found.initial is None else found.initial  # no two results are one tensor
        return dq, dk, dv, d_decay, d_initial

    def _back_shapes(self, *args: Any) -> tuple[Tensor, ...]:
        _, rows, (*_, wants_decay) = _taken(args)
        dq, dk, dv = (x.new_empty(x.shape) for x in rows.qkv)
        fading = rows.fading if wants_decay else None
        d_decay = _summed(rows.v, 0) if fading is None else torch.empty_like(fading)
        d_state = (len(rows.v), rows.feature_map.features, rows.v.shape[2] + 1) if self.state else (0,)
        return dq, dk, dv, d_decay, _summed(rows.v, *d_state)


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: _Operation, forward: Any, backward: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            *results, kept = forward(*args)
        ctx.backward_, ctx.count = backward, len(args)
        given = args[: len(args) - (2 if operation.state else 0)]
        # A tensor in the context that is not saved would live as long as the graph.
        ctx.given = [None if isinstance(x, Tensor) else x for x in given]
        ctx.tensors = [place for place, x in enumerate(given) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(given[place] for place in ctx.tensors), *results[: operation.saved], *kept)
        ctx.differentiable = operation.differentiable
        absent = (x for x in results[: operation.differentiable] if x.shape == (0,))  # a state that is not carried on
        ctx.mark_non_differentiable(*absent, *results[operation.differentiable :], *kept)
        ctx.set_materialize_grads(False)  # else zeros are made for what was kept
        return *results, *kept

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, *grads: Maybe) -> tuple[Maybe, ...]:
        given, wants = list(ctx.given), ctx.needs_input_grad[3:]
        for place, x in zip(ctx.tensors, saved, strict=False):
            given[place] = x
        rest = list(saved[len(ctx.tensors) :])
        dq, dk, dv, d_decay, d_state = ctx.backward_(*given, rest, list(grads[: ctx.differentiable]), wants[3])
        nothing = [None] * (ctx.count - 4)
        if len(given) < ctx.count and wants[len(given)]:
            nothing[len(given) - 4] = d_state
        return None, None, None, dq, dk, dv, d_decay if wants[3] else None, *nothing


def _scan(
    engine: Backend, rows: Rows, delay: int, carries: bool, learns: bool, sums: Maybe, log_scale: Maybe
) -> tuple[Any, ...]:
    rows = replace(rows, delay=delay)
    before = None if sums is None or log_scale is None else AttentionState(sums, log_scale)
    initial = before
    if before is not None and rows.decay is not None:  # a scan begins ``delay`` positions before its first key
        initial = before.faded(rows.decay * delay)
    done = engine.scan_forward(rows, initial, learns)
    behind = done.out.new_empty(0)
    if carries:
        entering, gone = max(0, rows.k.shape[1] - delay), before
        state = engine.state(rows.at(slice(0, entering)))
        if before is not None:
            gone = before.faded(rows.fade(0, entering))
        state = state if gone is None else state.merge(gone)
        behind = state.sums * torch.exp(state.log_scale - done.log_scale)
    return done.out, done.lse, behind, done.log_scale, (done.inverse_den, *done.kept) if learns else ()


def _scan_shapes(
    engine: Backend, rows: Rows, delay: int, carries: bool, learns: bool, sums: Maybe, log_scale: Maybe
) -> tuple[Any, ...]:
    (number, length, value_dim), v = rows.v.shape, rows.v
    behind = _summed(v, number, rows.feature_map.features, value_dim + 1) if carries else _summed(v, 0)
    kept = engine.scan_kept(replace(rows, delay=delay), sums is not None) if learns else ()
    out, lse = _summed(v, number, length, value_dim), _summed(v, number, length, 1)
    return out, lse, behind, _summed(v, number, 1, 1), kept


def _scan_backward(
    engine: Backend, rows: Rows, delay: int, carries: bool, learns: bool, saved: list[Any], grads: list[Maybe],
    wants_decay: bool,
) -> Gradients:  # fmt: skip
    out, inverse_den, *kept = saved
    return engine.scan_backward(replace(rows, delay=delay), out, inverse_den, kept, *grads, wants_decay)


def _window(engine: Backend, rows: Rows, window: int, causal: bool) -> tuple[Any, ...]:
    return *engine.window_forward(rows, window, causal), ()


def _window_shapes(engine: Backend, rows: Rows, window: int, causal: bool) -> tuple[Any, ...]:
    return _summed(rows.v, *rows.v.shape), _summed(rows.v, *rows.v.shape[:2], 1), ()


def _window_backward(
    engine: Backend, rows: Rows, window: int, causal: bool, saved: list[Any], grads: list[Maybe], wants_decay: bool
) -> Gradients:
    return engine.window_backward(rows, window, causal, *saved, *grads, wants_decay)


def _bidirectional(engine: Backend, rows: Rows) -> tuple[Any, ...]:
    return engine.bidirectional_forward(rows, None)


def _bidirectional_shapes(engine: Backend, rows: Rows) -> tuple[Any, ...]:
    return _summed(rows.v, *rows.q.shape[:2], rows.v.shape[2]), engine.bidirectional_kept(rows)


def _bidirectional_backward(
    engine: Backend, rows: Rows, saved: list[Any], grads: list[Maybe], wants_decay: bool
) -> Gradients:
    return engine.bidirectional_backward(rows, None, saved[0], saved[1:], *grads)


for _operation in (
    _Operation(
        "scan", ", SymInt delay, bool carries, bool learns", ", Tensor? sums, Tensor? log_scale", 4,
        _scan, _scan_shapes, _scan_backward, saved=1, differentiable=3,
    ),
    _Operation(
        "window", ", SymInt window, bool causal", "", 2,
        _window, _window_shapes, _window_backward, saved=2, differentiable=2,
    ),
    _Operation(
        "bidirectional", "", "", 1,
        _bidirectional, _bidirectional_shapes, _bidirectional_backward, saved=1, differentiable=1,
    ),
):  # fmt: skip
    _operation.define()
