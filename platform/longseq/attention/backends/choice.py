"""Who computes the three operations attention is made of: plain PyTorch everywhere, our own kernels where they can.

Those are in C++ for CPUs and in Triton for CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from longseq.attention import bidirectional, scan, window
from longseq.attention.bidirectional import Total
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.operators import is_traced
from longseq.attention.options import BACKENDS
from longseq.attention.parts import Part
from longseq.attention.scan import Gradients, Rows, Scanned
from longseq.attention.state import AttentionState, widened

_log = logging.getLogger("longseq")
_Result = TypeVar("_Result")


class Backend:
    """The operations on rows (N, L, ·), N = batch · heads, as documented at the PyTorch versions.

    Nothing here knows of autograd, and no result is an alias of an input: see :mod:`longseq.attention.operators`.
    """

    scan_forward: Callable[[Rows, AttentionState | None, bool], Scanned]
    scan_kept: Callable[[Rows, bool], tuple[Tensor | None, ...]]
    scan_backward: Callable[..., Gradients]
    sum_up: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, FeatureMap], AttentionState]
    window_forward: Callable[[Rows, int, bool], Part]
    window_backward: Callable[..., Gradients]
    bidirectional_forward: Callable[[Rows, Total | None], tuple[Tensor, tuple[Tensor, ...]]]
    bidirectional_kept: Callable[[Rows], tuple[Tensor, ...]]
    bidirectional_backward: Callable[..., Gradients]

    def __init__(self, *modules: ModuleType):
        """Each operation is the function of that name in the first of the modules that has it."""
        for name in Backend.__annotations__:
            setattr(self, name, next(getattr(module, name) for module in modules if hasattr(module, name)))

    def state(self, rows: Rows) -> AttentionState:
        """The state of the keys, those of the last one's document, as seen from behind the last."""
        k, v, out, weight = rows.k, rows.v, rows.hidden, None
        if not k.shape[1]:
            return AttentionState.empty(len(k), rows.feature_map.features, v.shape[-1], like=widened(v))
        if rows.runs is not None:
            other = rows.runs != rows.runs[:, -1:]
            out = other if out is None else out | other
        if rows.gate is not None:
            weight = (rows.gate[:, -1:] - rows.gate[:, 1:]).to(widened(v[:, :0]).dtype)
        if rows.decay is not None:
            weight = -rows.decay * torch.arange(k.shape[1], 0, -1, device=k.device).to(rows.decay)[:, None]
        if out is not None:
            weight = widened(k[..., :1]).new_zeros(*k.shape[:2], 1) if weight is None else weight
            weight = weight.masked_fill(out[..., None], -torch.inf)
        return self.sum_up(k, v, None, weight, rows.feature_map)


class Torch(Backend):
    """Plain PyTorch operations, a chunk at a time: any device, any kernel."""

    def __init__(self) -> None:
        super().__init__(scan, bidirectional, window)
        for name, operation in vars(self).items():
            if not name.endswith("_kept"):
                setattr(self, name, _in_fp32(operation))


def _in_fp32(operation: Callable[..., _Result]) -> Callable[..., _Result]:
    """Its fp32 products in fp32, whatever linear layers may do: an exponent of size 20 in TF32 is 1 % off."""

    @functools.wraps(operation)
    def exactly(*arguments: Any, **named: Any) -> _Result:
        allowed = torch.get_float32_matmul_precision()
        if allowed == "highest":
            return operation(*arguments, **named)
        torch.set_float32_matmul_precision("highest")
        try:
            return operation(*arguments, **named)
        finally:
            torch.set_float32_matmul_precision(allowed)

    return exactly


class Native(Backend):
    """Our C++ kernels: fp32 on CPUs, features in a core's cache only. They are compiled when first asked for."""

    def __init__(self) -> None:
        from longseq.attention.backends.native import backend

        super().__init__(backend, bidirectional)


class Triton(Backend):
    """Our Triton kernels on NVIDIA GPUs, features in registers only. Triton is first imported here."""

    def __init__(self) -> None:
        from longseq.attention.backends.triton import scan as triton_scan
        from longseq.attention.backends.triton import window as triton_window

        super().__init__(triton_scan, triton_window)


def choose(backend: str, feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> Backend:
    """The backend of that name, or for "auto" the fastest that can do this.

    Raises:
        ValueError: for an unknown backend, or one of our own kernels' for what they cannot do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    asked = backend
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "native"}.get(rows[0].device.type, "torch")
    if backend == "torch":
        return _made(Torch)
    reason = (_not_in_triton if backend == "triton" else _not_native)(feature_map, rows)
    if reason is None:
        return _made(Triton if backend == "triton" else Native)
    if asked == "auto":
        if not is_traced():
            _say_once(backend, reason)
        return _made(Torch)
    raise ValueError(f'backend="{backend}" cannot do this: {reason}. backend="torch" can, and "auto" chooses')


def name_of(engine: Backend) -> str:
    """The backend's name, as ``choose`` takes it."""
    return type(engine).__name__.lower()


@functools.cache
def _made(kind: Callable[[], Backend]) -> Backend:
    return kind()


@functools.cache
def _say_once(backend: str, reason: str) -> None:
    kernels = "Triton" if backend == "triton" else "native CPU"
    _log.warning(
        "Attention runs by PyTorch's own operations, not by the %s kernels: %s. That is a loop in Python over chunks "
        "of the sequence, many small operations each, and features of a chunk are in memory.",
        kernels,
        reason,
    )


def _not_native(feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> str | None:
    from longseq.attention.backends.native import backend

    return backend.unsupported(feature_map, rows)


def _not_in_triton(feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> str | None:
    if not _triton_is_installed():
        return "the package triton is not installed (pip install triton, on Linux)"
    from longseq.attention.backends.triton import launch as triton_launch

    return triton_launch.unsupported(feature_map, rows)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
