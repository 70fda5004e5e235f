"""Memory of tensors: the peak during a call, and what is free."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

from longseq.measure.control_group import left_to_the_group

Call = Callable[[], tuple[Tensor, ...]]


class PeakMeter:
    """Peak bytes of tensors from its making to :meth:`stop`, beyond those alive before.

    On CUDA these are the caching allocator's. On the CPU every allocation and release of torch's allocator is recorded,
    those inside its C++ operators too; scratch that MKL or oneDNN take from the system is not seen. The resident set of
    the process would be, but it moves by more than a short attention needs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        # The older of torch's two profilers: it yields the plain list of allocations, starts at once, prints nothing.
        _enable_profiler_legacy(
            ProfilerConfig(
                ProfilerState.CPU,
                report_input_shapes=False,
                profile_memory=True,
                with_stack=False,
                with_flops=False,
                with_modules=False,
                experimental_config=_ExperimentalConfig(),
            )
        )

    def stop(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.before
        alive = highest = 0
        threads = _disable_profiler_legacy()
        for event in (event for thread in threads for event in thread if str(event.kind()) == "memory_alloc"):
            alive += event.cpu_memory_usage()
            highest = max(highest, alive)
        return highest


def peak(call: Call, device: torch.device) -> tuple[int, int]:
    """Peak bytes during ``call`` as :class:`PeakMeter` counts them, and the bytes of the tensors it returns."""
    meter = PeakMeter(device)
    try:
        result = call()
        returned = _bytes(result)
    finally:
        highest = meter.stop()
    return highest, returned


def available(device: torch.device) -> float:
    """Bytes that can still be taken; infinite where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / 2
        except (ValueError, OSError):
            return float("inf")
    return min(free, left_to_the_group())


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
