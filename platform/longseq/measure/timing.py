"""Time of calls on a machine that may be busy with other things, and the machine's own rate next to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

# Shorter calls are repeated until a sample lasts this long: a timer's own cost and a thread's wake-up are microseconds.
SAMPLE_SECONDS = 0.02


def seconds_per_call(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean wall-clock seconds of ``repeats`` calls in a row; on CUDA until the device has done them."""
    start = now(device)
    for _ in range(repeats):
        call()
    return (now(device) - start) / repeats


def repeats_for(seconds: float) -> int:
    """How many calls of that duration make a sample."""
    return max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7)))


@dataclass
class Gemm:
    """The rate of one square matrix product, measured in every round among the contenders.

    It is what this machine gave in those minutes, to the same number of threads in the same dtype. Shares are relative
    to the median of all samples.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    rates: list[float] = field(default_factory=list)  # FLOP/s

    def __post_init__(self) -> None:
        self._a, self._b = (torch.randn(self.size, self.size, device=self.device, dtype=self.dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._repeats = 1
        self._product()
        self._repeats = repeats_for(seconds_per_call(self._product, self.device))

    def measure(self) -> None:
        self.rates.append(2 * self.size**3 / seconds_per_call(self._product, self.device, self._repeats))

    @property
    def median(self) -> float:
        return median(self.rates)

    def _product(self) -> None:
        torch.mm(self._a, self._b, out=self._out)


def now(device: torch.device) -> float:
    """The clock, in seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
