"""What recomputations start from, in the CPU's memory until the backward pass: copied beside the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """For the blocks of one forward pass, in their order.

    Copies go through pinned memory, on a stream of their own. While a block is computed again, the input of the one
    before it is on its way back.
    """

    def __init__(self) -> None:
        self._last: _Offloaded | None = None

    def of(self, x: Tensor) -> AbstractContextManager[object]:
        """Keep ``x`` on the CPU where it is saved in this context; and nothing else, which all blocks share."""
        if not on_gpu(x):
            return nullcontext()
        storage = x.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Tensor | _Offloaded:
            if tensor.untyped_storage().data_ptr() != storage:
                return tensor
            self._last = _Offloaded(tensor, self._last)
            return self._last

        return saved_tensors_hooks(pack, lambda kept: kept.fetch() if isinstance(kept, _Offloaded) else kept)


def on_gpu(x: Tensor) -> bool:
    """Whether there is another memory to keep it in."""
    return x.is_cuda


class _Offloaded:
    """A tensor on its way to the CPU, there, or on its way back."""

    def __init__(self, tensor: Tensor, before: _Offloaded | None):
        self.device, self.before = tensor.device, before
        self.back: Tensor | None = None
        stream = _stream(self.device)
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # until it is computed
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is nobody else's until it is copied

    def begin(self) -> None:
        """Send it back."""
        with torch.cuda.stream(_stream(self.device)):
            self.back = self.host.to(self.device, non_blocking=True)

    def fetch(self) -> Tensor:
        if self.back is None:
            self.begin()
        back, self.back = self.back, None
        assert back is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(_stream(self.device))
        back.record_stream(current)
        if self.before is not None:
            self.before.begin()
        return back


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
