"""What every launch of our Triton kernels needs to know of the machine and the tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from longseq.attention.backends.triton import rows as triton_rows
from longseq.attention.feature_maps import FeatureMap, not_written
from longseq.attention.fused import MOST_ROWS

# Without a GPU the kernels can only be interpreted: TRITON_INTERPRET=1, set before triton is imported.
INTERPRETED = triton_rows.INTERPRETED.value


WIDEST = 128  # head_dim and value_dim; wider tiles do not fit beside each other
CAPABILITY = (8, 0)  # tensor cores for bf16
TENSOR_MEMORY = 512  # columns of sm_100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Chip:
    """What the tiles of a launch depend on."""

    capability: tuple[int, int]
    shared_memory: int  # bytes that one block may ask for (opt-in)


# What launches are shaped for where the tensors are on no GPU: interpreted, or compiled here for another machine.
ELSEWHERE = Chip((9, 0), 232_448)


def chip(device: torch.device) -> Chip:
    """The GPU of that name, or ``ELSEWHERE``."""
    if device.type != "cuda":
        return ELSEWHERE
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu(index: int) -> Chip:
    # Triton refuses a launch that asks for more than this.
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return Chip(torch.cuda.get_device_capability(index), properties["max_shared_mem"])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for: 166,912 on sm_80, 101,376 on sm_86, 89, 120, else 232,448."""
    return chip(device).shared_memory


@dataclass(frozen=True)
class Needs:
    """What the hungriest kernel of an operation asks of a chip, forward or backward."""

    shared: int  # bytes of a block
    tensor_memory: int  # columns, where a chip has them

    def fits(self, there: Chip) -> bool:
        return self.shared <= there.shared_memory and (there.capability[0] != 10 or self.tensor_memory <= TENSOR_MEMORY)


# By padded width. tests/gpu/test_offline.py holds them against what is compiled.
_WINDOW = {64: Needs(36_864, 512), 128: Needs(98_312, 512)}
# Of features, whose tiles follow from the chip: by the shared memory that it has at least, and if rows are 16 bits.
_FEATURES = {
    (200_000, True): {64: Needs(81_920, 512), 128: Needs(147_456, 512)},
    (160_000, True): {64: Needs(73_872, 0), 128: Needs(118_784, 0)},
    (0, True): {64: Needs(73_872, 0), 128: Needs(90_112, 0)},
    (160_000, False): {64: Needs(81_920, 0), 128: Needs(131_072, 0)},
    (0, False): {64: Needs(81_920, 0), 128: Needs(90_112, 0)},
}


def needed_memory(window: bool, width: int, there: Chip, dtype: torch.dtype) -> Needs:
    """Of the window's kernels, or those of features, for rows that wide on that chip."""
    half = dtype != torch.float32
    tables = (table for (least, of), table in _FEATURES.items() if of == half and there.shared_memory > least)
    return (_WINDOW if window else next(tables))[max(64, padded(width))]


def unsupported(feature_map: FeatureMap | None, rows: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot compute attention of these rows (N, L, ·) with this feature map; None if they can."""
    device, widest = rows[0].device, max(x.shape[-1] for x in rows)
    if not INTERPRETED:
        if device.type != "cuda" or torch.version.hip:
            return f"the kernels run on NVIDIA GPUs, and the tensors are on {device}"
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            return f"the kernels need compute capability {CAPABILITY}; {torch.cuda.get_device_name(device)} has less"
    if rows[0].dtype not in DTYPES:
        return f"the kernels take torch.float32, bfloat16 and float16, and the inputs are {rows[0].dtype}"
    if widest > WIDEST:
        return f"head_dim and value_dim may be up to {WIDEST}, and one is {widest}"
    there = chip(device)
    needed = needed_memory(feature_map is None, widest, there, rows[0].dtype)
    if not needed.fits(there):
        name, columns = "sm_{}{}".format(*there.capability), f" and {needed.tensor_memory} columns of tensor memory"
        return (
            f"head_dim {widest} in {rows[0].dtype} needs {needed.shared:,} bytes of shared memory a block"
            f"{columns if there.capability[0] == 10 else ''}, and {name} has {there.shared_memory:,}"
        )
    if len(rows[0]) > MOST_ROWS:
        return f"batch · heads may be up to {MOST_ROWS} and is {len(rows[0])}"
    return not_written(feature_map, "Triton")


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def padded(width: int) -> int:
    """The size of a tile that many columns wide: tl.dot wants a power of two, and at least 16."""
    made: int = max(16, triton.next_power_of_2(width))
    return made


def pointer(x: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel wants a pointer also where it reads nothing."""
    return unused if x is None else x
