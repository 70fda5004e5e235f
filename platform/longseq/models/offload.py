"""What recomputations start from, in the CPU's memory until the backward pass: copied during the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longseq import pinned


class Offload:
    """For the blocks of one forward pass, in their order.

    Copies go through pinned memory, on a stream of their own. While a block is computed again, the input of the one
    before it is on its way back.
    """

    def __init__(self) -> None:
        self._last: _Offloaded | None = None

    def of(self, x: Tensor) -> AbstractContextManager[object]:
        """Keep ``x`` on the CPU where it is saved in this context; and nothing else, which all blocks share."""
        if not pinned.on_gpu(x):
            return nullcontext()
        storage = x.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Tensor | _Offloaded:
            if tensor.untyped_storage().data_ptr() != storage:
                return tensor
            self._last = _Offloaded(tensor, self._last)
            return self._last

        return saved_tensors_hooks(pack, lambda kept: kept.fetch() if isinstance(kept, _Offloaded) else kept)


class _Offloaded:
    """A tensor on its way to the CPU, there, or on its way back."""

    def __init__(self, tensor: Tensor, before: _Offloaded | None):
        self.device, self.before = tensor.device, before
        self.back: Tensor | None = None
        self.stream = pinned.stream_for("activations", self.device)
        self.host = pinned.copy_out(tensor, self.stream)

    def begin(self) -> None:
        """Send it back."""
        with torch.cuda.stream(self.stream):
            self.back = self.host.to(self.device, non_blocking=True)

    def fetch(self) -> Tensor:
        if self.back is None:
            self.begin()
        back, self.back = self.back, None
        assert back is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        back.record_stream(current)
        if self.before is not None:
            self.before.begin()
        return back
