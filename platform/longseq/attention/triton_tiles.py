"""The tiles of the kernels of a scan: what fits into the shared memory and the registers of a chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

# Rows that a program holds at a time.
CHUNK = 64

# Elements of a state that a program of the scan over segments takes along.
STATES: dict[str, Any] = {"B": 512, "num_warps": 1, "num_stages": 1}


@dataclass(frozen=True)
class Tiles:
    """Features at a time and options of each kernel's launch."""

    sums: dict[str, Any]
    states: dict[str, Any]
    outputs: dict[str, Any]
    queries: dict[str, Any]
    keys: dict[str, Any]


def tiles(shared_bytes: int, features: int, head_dim: int, value_dim: int, *, half: bool) -> Tiles:
    """The tiles for a chip on which a block may have that many bytes of shared memory."""
    most = triton.next_power_of_2(features)
    wide = max(head_dim, value_dim) > 64
    # The chips with the most shared memory multiply 64 rows by 64 and more columns at a time from there; 4 warps share
    # 64 rows. The others multiply from registers: less at a time, by more warps.
    tensor_memory = shared_bytes > 200_000
    warps = 4 if tensor_memory and not wide else 8

    def options(block: int, num_warps: int) -> dict[str, Any]:
        return {"F": max(16, min(block, most)), "num_warps": num_warps, "num_stages": 1}

    if not half:
        block = 32 if shared_bytes > 160_000 else 16
        return Tiles(options(32, 4), STATES, *(options(block, 8) for _ in range(3)))
    block = 64 if tensor_memory else 16 if wide and shared_bytes < 110_000 else 32
    return Tiles(options(64 if wide else 128, 4), STATES, *(options(block, warps) for _ in range(3)))
