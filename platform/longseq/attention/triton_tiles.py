"""The tiles of the kernels of a scan: what fits into the shared memory and the registers of a chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

# Rows that a program holds at a time.
CHUNK = 64


@dataclass(frozen=True)
class Tiles:
    """Features at a time and options of each kernel's launch."""

    sums: dict[str, Any]
    states: dict[str, Any]
    outputs: dict[str, Any]
    queries: dict[str, Any]
    keys: dict[str, Any]


def tiles(shared_bytes: int, features: int, head_dim: int, value_dim: int, *, half: bool) -> Tiles:
    block = max(16, min(64, triton.next_power_of_2(features))) if half else 32
    options = {"F": block, "num_warps": 4, "num_stages": 1}
    return Tiles(options, {"B": 512, "num_warps": 1, "num_stages": 1}, options, options, options)
