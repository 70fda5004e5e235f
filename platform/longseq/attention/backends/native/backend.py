"""FAVOR+ on CPUs by our own C++ kernels: scan, bidirectional attention and exact window, forward and backward.

The formulas and their names are those of :mod:`longseq.attention.scan`, :mod:`longseq.attention.bidirectional` and
:mod:`longseq.attention.window`. A thread takes one row of N = batch · heads at a time and keeps a chunk's features and
the state in its core's cache, so that products run at the speed of the arithmetic and nothing of a chunk goes through
main memory. Every sum has one order, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longseq.attention.backends.native import build
from longseq.attention.bidirectional import Total
from longseq.attention.feature_maps import (
    EPSILON,
    LEAST_POWER,
    FeatureMap,
    Generalised,
    PositiveExponential,
    not_written,
)
from longseq.attention.parts import Part
from longseq.attention.scan import CHUNK, GROUP, Gradients, Rows, Scanned
from longseq.attention.state import AttentionState

_LOG2E = math.log2(math.e)


def unsupported(feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot compute attention of these rows (N, L, ·) with this feature map; None if they can."""
    if rows[0].device.type != "cpu":
        return f"the kernels run on CPUs, and the tensors are on {rows[0].device}"
    if rows[0].dtype == torch.float64:
        return f"the kernels compute in torch.float32, and the inputs are {rows[0].dtype}"
    return not_written(feature_map, "C++") or build.unavailable()


class _Map(ctypes.Structure):
    """``FeatureMap`` of features.hpp."""

    _fields_ = (
        ("relu", ctypes.c_int32),
        ("features", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("log_constant", ctypes.c_float),
        ("least", ctypes.c_float),
    )


class _Shape(ctypes.Structure):
    """``Shape`` of state.hpp."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("delay", ctypes.c_int64),
        ("value_dim", ctypes.c_int32),
    )


class _Band(ctypes.Structure):
    """``Band`` of window.hpp."""

    _fields_ = (("window", ctypes.c_int64), ("causal", ctypes.c_int32))


class _Inputs(ctypes.Structure):
    """``Inputs`` of kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "hidden", "runs", "decay", "gate")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("q_step", "k_step", "v_step")),
    )


class _States(ctypes.Structure):
    """``States`` of state.hpp."""

    _fields_ = (("sums", ctypes.c_void_p), ("log_scale", ctypes.c_void_p))


class _Call:
    """The arguments that all kernels share, and the tensors that must live as long as they do."""

    def __init__(self, rows: Rows) -> None:
        self.q, self.k, self.v = (_in_rows(x) for x in rows.qkv)
        self.map, of_map = _map(rows.phi, rows.q.shape[-1])
        hidden = None if rows.hidden is None else rows.hidden.to(torch.uint8).contiguous()
        runs = None if rows.runs is None else rows.runs.to(torch.int32).contiguous()
        decay = None if rows.decay is None else rows.decay.detach().to(torch.float32).contiguous()
        gate = None if rows.gate is None else rows.gate.detach().contiguous()
        self.alive = of_map, hidden, runs, decay, gate
        self.shape = _Shape(rows.k.shape[1], rows.q.shape[1], rows.delay, rows.v.shape[-1])
        pointers = (_address(x) for x in (self.q, self.k, self.v, hidden, runs, decay, gate))
        self.inputs = _Inputs(*pointers, len(rows.q), *(x.stride(0) for x in (self.q, self.k, self.v)))

    def run(self, name: str, *more: Tensor | ctypes.Structure | None) -> None:
        function = getattr(build.library(), name)
        function.restype = None
        arguments = (
            ctypes.byref(x) if isinstance(x, ctypes.Structure) else _pointer(x)
            for x in (self.map, self.shape, self.inputs, *more)
        )
        function(*arguments, ctypes.c_int(torch.get_num_threads()))


def _map(feature_map: FeatureMap | None, head_dim: int) -> tuple[_Map, tuple[Tensor | None, ...]]:
    """The map as the kernels take it, and the tensors it points to. None: a window has none."""
    if feature_map is None:
        return _Map(0, 0, head_dim, None, None, 0.0, 0.0), ()
    assert isinstance(feature_map, (PositiveExponential, Generalised))
    exponential = isinstance(feature_map, PositiveExponential)
    weight = feature_map.weight.contiguous()
    shift = feature_map.shift if isinstance(feature_map, PositiveExponential) else None
    shift = None if shift is None else shift.contiguous()
    least = LEAST_POWER[torch.float32] if exponential else EPSILON
    constant = feature_map.log_constant * _LOG2E
    return _Map(not exponential, *weight.shape, _address(weight), _address(shift), constant, least), (weight, shift)


def _in_rows(x: Tensor) -> Tensor:
    """x (N, L, n) in fp32, with each (L, n) in one piece."""
    x = x.float()
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_address(x))


def _states(sums: Tensor, log_scale: Tensor | None) -> _States:
    """Both contiguous, and to be kept alive."""
    return _States(_address(sums), _address(log_scale))


def scan_forward(rows: Rows, initial: AttentionState | None, learns: bool) -> Scanned:
    """See :func:`longseq.attention.scan.scan_forward`."""
    call = _Call(rows)
    v = call.v
    out = v.new_empty(v.shape)
    lse, inverse_den = v.new_empty(*v.shape[:2], 1), v.new_empty(*v.shape[:2], 1)
    kept = (
        v.new_empty(len(v), _groups(v.shape[1]) * _state_floats(build.library(), call.map.features, v.shape[2]))
        if learns
        else None
    )
    log_scale = v.new_empty(len(v), 1, 1)
    given = None if initial is None else (initial.sums.contiguous(), initial.log_scale.contiguous())
    state = None if given is None else _states(*given)
    call.run("longseq_scan_forward", state, out, lse, inverse_den, kept, log_scale)
    return Scanned(out, lse, inverse_den, () if kept is None else (kept,), log_scale)


def scan_kept(rows: Rows, initial: bool) -> tuple[Tensor | None, ...]:
    """See :func:`longseq.attention.scan.scan_kept`."""
    (number, length, value_dim), features = rows.v.shape, rows.feature_map.features
    sizes = (
        (number, length, 1),
        (number, _groups(length) * _state_floats(build.library(), int(features), int(value_dim))),
    )
    return tuple(rows.v.new_empty(size, dtype=torch.float32) for size in sizes)


def _groups(length: int) -> int:
    """States that a row of N keeps; CHUNK and GROUP of the C++ are those of the PyTorch version."""
    return (length + CHUNK * GROUP - 1) // (CHUNK * GROUP)


@functools.cache
def _state_floats(library: ctypes.CDLL, features: int, value_dim: int) -> int:
    function = library.longseq_scan_kept
    function.restype = ctypes.c_int64
    of_one_group = _Map(0, features, 1, None, None, 0.0, 0.0), _Shape(1, 1, 0, value_dim)
    made: int = function(*(ctypes.byref(x) for x in of_one_group))
    return made


def scan_backward(
    rows: Rows,
    out: Tensor,
    inverse_den: Tensor,
    kept: Sequence[Tensor | None],
    dout: Tensor | None,
    dlse: Tensor | None,
    later: Tensor | None,
    wants_decay: bool,
) -> Gradients:
    """See :func:`longseq.attention.scan.scan_backward`."""
    call = _Call(rows)
    v = call.v
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    later = None if later is None else later.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    d_decay = _no_gradient(rows, wants_decay)
    d_initial = v.new_empty(len(v), rows.feature_map.features, v.shape[-1] + 1)
    states = None if later is None else _states(later, None), _states(d_initial, None)
    call.run("longseq_scan_backward", *states, out, inverse_den, *kept, dout, dlse, dq, dk, dv, d_decay)
    return Gradients(dq, dk, dv, d_decay, d_initial)


def _no_gradient(rows: Rows, wanted: bool) -> Tensor | None:
    """Zeros for the decay's gradient or the gate's, which the kernels always add to."""
    fading = rows.fading if wanted or rows.gate is not None else None
    return None if fading is None else torch.zeros_like(fading, dtype=torch.float64)


def sum_up(
    x: Tensor, values: Tensor, last: Tensor | None, log_weight: Tensor | None, feature_map: FeatureMap
) -> AttentionState:
    """See :func:`longseq.attention.bidirectional.sum_up`."""
    hidden = None
    if log_weight is not None:
        hidden = log_weight[..., 0] == -torch.inf
        log_weight = log_weight.contiguous()
    call = _Call(Rows(x, x, values, hidden=hidden, phi=feature_map))
    x = call.q
    last = None if last is None else last.contiguous()
    state = AttentionState(x.new_empty(len(x), feature_map.features, values.shape[-1] + 1), x.new_empty(len(x), 1, 1))
    call.run("longseq_sum_up", _states(state.sums, state.log_scale), last, log_weight)
    return state


def bidirectional_forward(rows: Rows, total: Total | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`longseq.attention.bidirectional.bidirectional_forward`."""
    call = _Call(rows)
    v, queries = call.v, rows.q.shape[:2]
    out, inverse_den = v.new_empty(*queries, v.shape[-1]), v.new_empty(*queries, 1)
    state = AttentionState(v.new_empty(len(v), call.map.features, v.shape[-1] + 1), v.new_empty(len(v), 1, 1))
    call.run("longseq_sum_up", _states(state.sums, state.log_scale), None, None)
    if total is not None:
        state = total(state)()
    call.run("longseq_bidirectional_read", _states(state.sums, state.log_scale), out, inverse_den)
    return out, (inverse_den, state.sums, state.log_scale)


def bidirectional_backward(
    rows: Rows, total: Total | None, out: Tensor, kept: Sequence[Tensor | None], dout: Tensor
) -> Gradients:
    """See :func:`longseq.attention.bidirectional.bidirectional_backward`."""
    inverse_den, sums, log_scale = kept
    assert sums is not None
    assert log_scale is not None
    call = _Call(rows)
    dq, dk, dv = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    dout, d_sums = dout.contiguous(), torch.empty_like(sums)
    states = _states(sums, log_scale), _states(d_sums, None)
    call.run("longseq_bidirectional_queries_vjp", *states, out, inverse_den, dout, dq)
    if total is not None:  # all have the same log-scale
        d_sums = total(AttentionState(d_sums, torch.zeros_like(log_scale)))().sums
    call.run("longseq_bidirectional_keys_vjp", _states(d_sums, log_scale), dk, dv)
    return Gradients(dq, dk, dv)


def window_forward(rows: Rows, window: int, causal: bool) -> Part:
    """See :func:`longseq.attention.window.window_forward`."""
    call = _Call(rows)
    out, lse = call.v.new_empty(rows.v.shape), call.v.new_empty(*rows.v.shape[:2], 1)
    call.run("longseq_window_forward", _Band(window, causal), out, lse)
    return out, lse


def window_backward(
    rows: Rows,
    window: int,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wants_decay: bool,
) -> Gradients:
    """See :func:`longseq.attention.window.window_backward`."""
    call = _Call(rows)
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = call.q.new_empty(rows.q.shape), call.k.new_zeros(rows.k.shape), call.v.new_zeros(rows.v.shape)
    d_decay = _no_gradient(rows, wants_decay)
    call.run("longseq_window_backward", _Band(window, causal), out, lse, dout, dlse, dq, dk, dv, d_decay)
    return Gradients(dq, dk, dv, d_decay)
