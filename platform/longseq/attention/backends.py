"""Who computes the three operations attention is made of: plain PyTorch everywhere, our own kernels where they can.

Those are in C++ for CPUs and in Triton for CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from longseq.attention.bidirectional import Total, bidirectional_attention, sum_up
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.parts import Part
from longseq.attention.scan import Rows, ScanGradients, Scanned, scan, scan_backward, scan_forward
from longseq.attention.state import AttentionState
from longseq.attention.window import window_attention

BACKENDS = ("auto", "torch", "native", "triton")

_log = logging.getLogger("longseq")


class Backend(Protocol):
    """The operations; rows (N, L, ·), N = batch · heads, as documented at the PyTorch versions."""

    def scan(
        self,
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

    def window(
        self,
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

    def bidirectional(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_map: FeatureMap,
        hidden: Tensor | None,
        total: Total | None = None,
    ) -> Tensor:
        """See :func:`longseq.attention.bidirectional.bidirectional_attention`."""

    def scan_forward(self, rows: Rows, initial: AttentionState | None, learns: bool) -> Scanned:
        """See :func:`longseq.attention.scan.scan_forward`."""

    def scan_backward(
        self,
        rows: Rows,
        out: Tensor,
        inverse_den: Tensor,
        kept: Sequence[Tensor | None],
        dout: Tensor | None,
        dlse: Tensor | None,
        later: Tensor | None,
        wants_decay: bool,
    ) -> ScanGradients:
        """See :func:`longseq.attention.scan.scan_backward`."""

    def sum_up(
        self, x: Tensor, values: Tensor, last: Tensor | None, log_weight: Tensor | None, feature_map: FeatureMap
    ) -> AttentionState:
        """See :func:`longseq.attention.bidirectional.sum_up`."""


class Torch:
    """Plain PyTorch operations, a chunk at a time: any device, any kernel."""

    scan = staticmethod(scan)
    window = staticmethod(window_attention)
    bidirectional = staticmethod(bidirectional_attention)
    scan_forward = staticmethod(scan_forward)
    scan_backward = staticmethod(scan_backward)
    sum_up = staticmethod(sum_up)


class Native:
    """Our C++ kernels: fp32 on CPUs, features in a core's cache only. They are compiled when first asked for."""

    def __init__(self) -> None:
        from longseq.attention.native import backend

        self.scan = backend.scan
        self.window = backend.window_attention
        self.bidirectional = backend.bidirectional_attention
        self.scan_forward = backend.scan_forward
        self.scan_backward = backend.scan_backward
        self.sum_up = backend.sum_up


class Triton:
    """Our Triton kernels: fp32 on NVIDIA GPUs, features in registers only. Triton is first imported here."""

    def __init__(self) -> None:
        from longseq.attention import triton_backend, triton_window

        self.scan = triton_backend.scan
        self.window = triton_window.window_attention
        self.bidirectional = triton_backend.bidirectional_attention
        self.scan_forward = triton_backend.scan_forward
        self.scan_backward = triton_backend.scan_backward
        self.sum_up = triton_backend.sum_up


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
        return Torch()
    reason = (_not_in_triton if backend == "triton" else _not_native)(feature_map, rows)
    if reason is None:
        return Triton() if backend == "triton" else Native()
    if asked == "auto":
        if not torch.compiler.is_compiling():
            _say_once(backend, reason)
        return Torch()
    raise ValueError(f'backend="{backend}" cannot do this: {reason}. backend="torch" can, and "auto" chooses')


def name_of(engine: Backend) -> str:
    """The backend's name, as ``choose`` takes it."""
    return type(engine).__name__.lower()


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
    from longseq.attention.native import backend

    return backend.unsupported(feature_map, rows)


def _not_in_triton(feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> str | None:
    if not _triton_is_installed():
        return "the package triton is not installed (pip install triton, on Linux)"
    from longseq.attention import triton_launch

    return triton_launch.unsupported(feature_map, rows)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
