"""Tensors of a GPU copied to the CPU during the computation: into pinned memory, on streams of their own."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def on_gpu(tensor: Tensor) -> bool:
    """Whether the CPU's memory is another one than the tensor's."""
    return tensor.is_cuda


@cache
def stream_for(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The stream of one purpose, so that no copy waits for those of another."""
    return torch.cuda.Stream(device)


def copy_out(tensor: Tensor, stream: torch.cuda.Stream, into: Tensor | None = None) -> Tensor:
    """A copy on the CPU, there when ``stream`` has come so far. ``into``: pinned memory of its size."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if into is None else into
    stream.wait_stream(torch.cuda.current_stream(tensor.device))  # until it is computed
    with torch.cuda.stream(stream):
        copy.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is nobody else's until it is copied
    return copy


class Copies:
    """Copies of a training's state. Made before they are read: :meth:`wait`, and before it changes: :meth:`hold`."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._device: torch.device | None = None

    def of(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A copy on the CPU. ``into``: an older one, to be written over where it fits."""
        if into is not None and (into.shape != tensor.shape or into.dtype != tensor.dtype):
            into = None
        if not on_gpu(tensor):
            return tensor.to("cpu", copy=True) if into is None else into.copy_(tensor)
        self._device, self._stream = tensor.device, stream_for("snapshots", tensor.device)
        return copy_out(tensor, self._stream, into)

    def hold(self) -> None:
        """Have the GPU, and not this process, wait for the copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        """Until all copies are made. Any thread may."""
        if self._stream is not None:
            self._stream.synchronize()
