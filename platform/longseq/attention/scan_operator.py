"""The scan as an operator, from nothing or from the state that earlier tiles of a sequence have left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longseq.attention.backends.choice import choose
from longseq.attention.feature_maps import FeatureMap, from_parts
from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import MAP, ROWS, operator, packed, summed, unpacked
from longseq.attention.parts import Part
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    delay: int = 0,
    hidden: Tensor | None = None,
    runs: Tensor | None = None,
    decay: Tensor | None = None,
    backend: str = "torch",
) -> Part:
    """Attention of query i over the keys j ≤ i − delay, by features.

    Args:
        q, k: (N, L, d), N = batch · heads, of any floating dtype.
        v: (N, L, e), same dtype.
        feature_map: the kernel, in the dtype of sums: fp32 or float64.
        delay: how many positions the nearest visible key lies before the query.
        hidden: (N, L) bool, True where a key is padding and must not be seen, or None.
        runs: (N, L) integers ≥ 0 that never decrease; a query sees keys of its own number only. None: one document.
        decay: (N, 1, 1) γ ≥ 0; every weight is multiplied by e^{−γ(i−j)}. None: no decay.
        backend: see :func:`longseq.attention.favor_attention`.

    Returns:
        out (N, L, e) and lse (N, L, 1), the log of the denominator, in fp32 (float64). A query that sees no
        key gets zeros and −1e30.
    """
    learns = _learns(q, k, v, decay)
    rows = q, k, v, decay, hidden, runs
    done = torch.ops.longseq.scan(*rows, None, None, *feature_map.parts(), delay, False, learns, backend)
    return done[0], done[1]


def carried_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    state: AttentionState | None,
    *,
    delay: int = 0,
    decay: Tensor | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, AttentionState]:
    """:func:`scan` over the next tile of a sequence, whose earlier keys are in ``state``; and the state behind it.

    A state is as seen from the first key of the next tile's scan, ``delay`` positions before its first query. The
    gradient goes through its sums.
    """
    sums, log_scale = (None, None) if state is None else (state.sums, state.log_scale)
    learns = _learns(q, k, v, decay, sums)
    out, lse, behind, scale, _ = torch.ops.longseq.scan(
        q, k, v, decay, None, None, sums, log_scale, *feature_map.parts(), delay, True, learns, backend
    )
    return out, lse, AttentionState(behind, scale)


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    sums: Tensor | None, log_scale: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float,
    delay: int, carries: bool, learns: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    phi = from_parts(kind, weight, shift, log_constant)
    engine = choose(backend, phi, (q, k, v))
    before = None if sums is None or log_scale is None else AttentionState(sums, log_scale)
    initial = before
    if before is not None and decay is not None:  # a scan begins ``delay`` positions before its first key
        initial = before.faded(decay * delay)
    done = engine.scan_forward(Rows(q, k, v, decay, hidden, runs, phi, delay), initial, learns)
    behind = done.out.new_empty(0)
    if carries:
        entering, log_weight, gone = max(0, k.shape[1] - delay), None, before
        if decay is not None:
            distances = torch.arange(entering, 0, -1, device=k.device)[:, None]
            log_weight = -decay * distances.to(decay)
            gone = None if before is None else before.faded(-decay * entering)
        state = engine.sum_up(k[:, :entering], v[:, :entering], None, log_weight, phi)
        state = state if gone is None else state.merge(gone)
        behind = state.sums * torch.exp(state.log_scale - done.log_scale)
    kept = packed((done.inverse_den, *done.kept), done.out) if learns else []
    return done.out, done.lse, behind, done.log_scale, kept


def _scan_shapes(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    sums: Tensor | None, log_scale: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float,
    delay: int, carries: bool, learns: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    (number, length, value_dim), phi = v.shape, from_parts(kind, weight, shift, log_constant)
    engine = choose(backend, phi, (q, k, v))
    out, lse, scale = summed(v, number, length, value_dim), summed(v, number, length, 1), summed(v, number, 1, 1)
    behind = summed(v, number, len(weight), value_dim + 1) if carries else summed(v, 0)
    kept: list[Tensor] = []
    if learns:
        rows = Rows(q, k, v, decay, hidden, runs, phi, delay)
        kept = packed(engine.scan_kept(rows, sums is not None), out)
    return out, lse, behind, scale, kept


def _scan_backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float, delay: int, backend: str,
    out: Tensor, kept: list[Tensor], dout: Tensor | None, dlse: Tensor | None, later: Tensor | None, wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    phi = from_parts(kind, weight, shift, log_constant)
    inverse_den, *left = unpacked(kept)
    assert inverse_den is not None
    rows = Rows(q, k, v, decay, hidden, runs, phi, delay)
    grads = choose(backend, phi, (q, k, v)).scan_backward(rows, out, inverse_den, left, dout, dlse, later, wants_decay)
    d_decay = out.new_empty(0) if grads.decay is None or decay is None else grads.decay.to(decay)
    return grads.q.to(q.dtype), grads.k.to(k.dtype), grads.v.to(v.dtype), d_decay, grads.initial


def _scan_backward_shapes(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, hidden: Tensor | None, runs: Tensor | None,
    kind: str, weight: Tensor, shift: Tensor | None, log_constant: float, delay: int, backend: str,
    out: Tensor, kept: list[Tensor], dout: Tensor | None, dlse: Tensor | None, later: Tensor | None, wants_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_decay = decay.new_empty(decay.shape) if decay is not None and wants_decay else out.new_empty(0)
    return dq, dk, dv, d_decay, summed(v, len(v), len(weight), v.shape[2] + 1)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        rows, (kind, weight, shift, log_constant, delay, carries, _, backend) = args[:6], args[8:]
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, behind, log_scale, kept = _SCAN(*args)
        ctx.numbers = kind, log_constant, delay, backend
        ctx.save_for_backward(*rows, weight, shift, out, *kept)
        ctx.mark_non_differentiable(log_scale, *kept, *(() if carries else (behind,)))
        ctx.set_materialize_grads(False)
        return out, lse, behind, log_scale, *kept

    @staticmethod
    def outputs(made: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        return *made[:4], list(made[4:])  # type: ignore[return-value]

    @staticmethod
    @first_order
    def backward(
        ctx: Any, saved: Saved, dout: Tensor | None, dlse: Tensor | None, later: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *rows, weight, shift, out = saved[:9]
        kind, log_constant, delay, backend = ctx.numbers
        wants = ctx.needs_input_grad
        dq, dk, dv, d_decay, d_sums = _SCAN_BACKWARD(
            *rows, kind, weight, shift, log_constant, delay, backend, out, list(saved[9:]), dout, dlse, later, wants[3]
        )
        return dq, dk, dv, d_decay if wants[3] else None, None, None, d_sums if wants[6] else None, *[None] * 9


_SCAN = operator(
    f"scan({ROWS}, Tensor? sums, Tensor? log_scale, {MAP}, SymInt delay, bool carries, bool learns, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _scan, _scan_shapes, _Scan,
)  # fmt: skip
_SCAN_BACKWARD = operator(
    f"scan_backward({ROWS}, {MAP}, SymInt delay, str backend, Tensor out, Tensor[] kept, Tensor? dout, Tensor? dlse, "
    "Tensor? later, bool wants_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward, _scan_backward_shapes,
)  # fmt: skip
