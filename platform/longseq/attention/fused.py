"""Whether what lies between attention and the linear maps is one Triton kernel each: on NVIDIA GPUs, in eager mode.

A layer at 8,192 tokens takes less time on a GPU than its host takes to launch a kernel for every small operation. A
compiler fuses them by itself, so while it reads along they are PyTorch's own, as they are on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from longseq.attention.operators import is_traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)
MOST_ROWS = 65535  # programs that CUDA starts along a grid's second axis, one for each sequence and head
# Whether tensors on other devices go these ways too: where kernels are interpreted, or compiled for another machine.
ELSEWHERE = False


def fuses(x: Tensor, backend: str = "auto") -> bool:
    """Whether the kernels take x; ``backend="torch"`` and ``"native"`` rule out Triton altogether."""
    if backend not in ("auto", "triton") or x.dtype not in DTYPES or is_traced(x):
        return False
    if x.device.type != "cuda":
        return ELSEWHERE
    return _runs_on(torch.cuda.current_device() if x.device.index is None else x.device.index)


@functools.cache
def _runs_on(gpu: int) -> bool:
    if torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(gpu) >= CAPABILITY
