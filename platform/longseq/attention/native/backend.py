"""FAVOR+ on CPUs by our own C++ kernels: scan, bidirectional attention and exact window, forward and backward.

The formulas and their names are those of :mod:`longseq.attention.scan`, :mod:`longseq.attention.bidirectional` and
:mod:`longseq.attention.window`. A thread takes one row of N = batch · heads at a time and keeps a chunk's features and
the state in its core's cache, so that products run at the speed of the arithmetic and nothing of a chunk goes through
main memory. Every sum has one order, whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longseq.attention.feature_maps import EPSILON, LEAST_POWER, FeatureMap, Generalised, PositiveExponential
from longseq.attention.native import build
from longseq.attention.parts import Part
from longseq.attention.state import in_full_precision

_LOG2E = math.log2(math.e)


def unsupported(feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot compute attention of these rows (N, L, ·) with this feature map; None if they can."""
    if rows[0].device.type != "cpu":
        return f"the kernels run on CPUs, and the tensors are on {rows[0].device}"
    if rows[0].dtype != torch.float32:
        return f"the kernels compute in torch.float32, and the inputs are {rows[0].dtype}"
    relu = isinstance(feature_map, Generalised) and feature_map.activation.value is torch.relu_
    if not (feature_map is None or isinstance(feature_map, PositiveExponential) or relu):
        return "of the kernels, only softmax, hyperbolic, oprf, smreg, relu and relu_direct are written in C++"
    return build.unavailable()


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
) -> Part:
    """See :func:`longseq.attention.scan.scan`."""
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, decay))
    return _Scan.apply(q, k, v, decay, hidden, runs, feature_map, delay, learns)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, hidden: Tensor | None) -> Tensor:
    """See :func:`longseq.attention.bidirectional.bidirectional_attention`."""
    return _TwoPasses.apply(q, k, v, hidden, feature_map)


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
) -> Part:
    """See :func:`longseq.attention.window.window_attention`."""
    return _Window.apply(q, k, v, decay, hidden, runs, window, causal)


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
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "hidden", "runs", "decay")),
        ("count", ctypes.c_int64),
    )


class _Call:
    """The arguments that all kernels share, and the tensors that must live as long as they do."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_map: FeatureMap | None,
        *,
        delay: int = 0,
        hidden: Tensor | None = None,
        runs: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.map, of_map = _map(feature_map, q.shape[-1])
        hidden = None if hidden is None else hidden.to(torch.uint8).contiguous()
        runs = None if runs is None else runs.to(torch.int32).contiguous()
        decay = None if decay is None else decay.detach().to(torch.float32).contiguous()
        self.alive = of_map, hidden, runs, decay
        self.shape = _Shape(k.shape[1], q.shape[1], delay, v.shape[-1])
        pointers = (_address(x) for x in (self.q, self.k, self.v, hidden, runs, decay))
        self.inputs = _Inputs(*pointers, len(q))

    def run(self, name: str, *tensors: Tensor | None, band: _Band | None = None) -> None:
        function = getattr(build.library(), name)
        function.restype = None
        structures = (x for x in (self.map, self.shape, self.inputs, band) if x is not None)
        function(*map(ctypes.byref, structures), *map(_pointer, tensors), ctypes.c_int(torch.get_num_threads()))

    def floats(self, name: str) -> int:
        """What a row of N keeps."""
        function = getattr(build.library(), name)
        function.restype = ctypes.c_int64
        return function(ctypes.byref(self.map), ctypes.byref(self.shape))


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


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_address(x))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        hidden: Tensor | None,
        runs: Tensor | None,
        feature_map: FeatureMap,
        delay: int,
        learns: bool,
    ) -> Part:
        call = _Call(q, k, v, feature_map, delay=delay, hidden=hidden, runs=runs, decay=decay)
        out = torch.empty_like(call.v)
        lse, inverse_den = v.new_empty(*v.shape[:2], 1), v.new_empty(*v.shape[:2], 1)
        kept = v.new_empty(len(v), call.floats("longseq_scan_kept")) if learns else None
        call.run("longseq_scan_forward", out, lse, inverse_den, kept)
        ctx.feature_map, ctx.delay = feature_map, delay
        ctx.save_for_backward(q, k, v, decay, hidden, runs, out, inverse_den, kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @in_full_precision
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, hidden, runs, out, inverse_den, kept = ctx.saved_tensors
        call = _Call(q, k, v, ctx.feature_map, delay=ctx.delay, hidden=hidden, runs=runs, decay=decay)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (call.q, call.k, call.v))
        wanted = decay is not None and ctx.needs_input_grad[3]
        d_decay = torch.zeros_like(decay, dtype=torch.float64) if wanted else None
        call.run("longseq_scan_backward", out, inverse_den, kept, dout, dlse, dq, dk, dv, d_decay)
        return dq, dk, dv, None if d_decay is None else d_decay.to(v), None, None, None, None, None


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, feature_map: FeatureMap) -> Tensor:
        call = _Call(q, k, v, feature_map, hidden=hidden)
        out, inverse_den = v.new_empty(*q.shape[:2], v.shape[-1]), v.new_empty(*q.shape[:2], 1)
        kept = v.new_empty(len(v), call.floats("longseq_bidirectional_kept"))
        call.run("longseq_bidirectional_forward", out, inverse_den, kept)
        ctx.feature_map = feature_map
        ctx.save_for_backward(q, k, v, hidden, out, inverse_den, kept)
        return out

    @staticmethod
    @in_full_precision
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, out, inverse_den, kept = ctx.saved_tensors
        call = _Call(q, k, v, ctx.feature_map, hidden=hidden)
        dq, dk, dv = (torch.empty_like(x) for x in (call.q, call.k, call.v))
        call.run("longseq_bidirectional_backward", out, inverse_den, kept, dout.contiguous(), dq, dk, dv)
        return dq, dk, dv, None, None


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        hidden: Tensor | None,
        runs: Tensor | None,
        window: int,
        causal: bool,
    ) -> Part:
        call = _Call(q, k, v, None, hidden=hidden, runs=runs, decay=decay)
        out, lse = torch.empty_like(call.v), v.new_empty(*v.shape[:2], 1)
        ctx.band = _Band(window, causal)
        call.run("longseq_window_forward", out, lse, band=ctx.band)
        ctx.save_for_backward(q, k, v, decay, hidden, runs, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @in_full_precision
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, hidden, runs, out, lse = ctx.saved_tensors
        call = _Call(q, k, v, None, hidden=hidden, runs=runs, decay=decay)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv = torch.empty_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
        wanted = decay is not None and ctx.needs_input_grad[3]
        d_decay = torch.zeros_like(decay, dtype=torch.float64) if wanted else None
        call.run("longseq_window_backward", out, lse, dout, dlse, dq, dk, dv, d_decay, band=ctx.band)
        return dq, dk, dv, None if d_decay is None else d_decay.to(v), None, None, None, None
