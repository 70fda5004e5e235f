"""The tiles of the kernels of a scan: what fits into the shared memory and the registers of a chip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from longseq.attention.backends.triton.launch import Chip

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


def tiles(there: Chip, features: int, head_dim: int, value_dim: int, *, half: bool) -> Tiles:
    """The tiles for rows that wide, of 16 bits or fp32, on that chip."""
    most = triton.next_power_of_2(features)
    wide = max(head_dim, value_dim) > 64
    # The chips with the most shared memory multiply 64 rows by 64 and more columns at a time from there; 4 warps share
    # 64 rows. The others multiply from registers: less at a time, by more warps.
    wgmma = there.capability[0] in (9, 10)
    warps = 4 if wgmma else 8

    def options(block: int, num_warps: int) -> dict[str, Any]:
        return {"F": max(16, min(block, most)), "num_warps": num_warps, "num_stages": 1}

    def keys(block: int, num_warps: int) -> dict[str, Any]:
        # 16-bit products from registers have no room for a state's second part: dk at std 2 is then 6e-3 off, not 5e-3.
        return {**options(block, num_warps), "ROOM": wgmma or not half}

    if not half:
        if there.capability[0] == 10:  # of 16 warps, products go without tensor memory, where their parts do not fit
            return Tiles(options(64, 16), STATES, options(32, 16), options(32, 16), keys(32, 16))
        small = there.shared_memory < 110_000
        block = 16 if wide and not wgmma else 32
        sums = options(32 if wide and small else 64, 8 if wide else 4)
        return Tiles(sums, STATES, options(block, 8), options(block, 8), keys(block, 8))
    block = 64 if wgmma else 16 if wide and there.shared_memory < 110_000 else 32
    sums = options(64 if wide else 128, 4 if wgmma else 8)
    # Of wide rows, dq on sm_100 and dk with dv overflow the registers of 4 warps; 8 multiply by 32 columns at a time.
    queries = 8 if wide and there.capability[0] == 10 else warps
    return Tiles(sums, STATES, options(block, warps), options(block, queries), keys(block, 8 if wide else warps))
