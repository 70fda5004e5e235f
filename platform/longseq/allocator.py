"""CPU memory between steps: freed tensors stay with the process instead of going back to the system."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_TOP_PAD_BYTES = 64 * 2**20
_LARGE_BYTES, _MOST_MAPPED = 512 * 2**10, 1 << 16
_keeping = False  # glibc cannot be asked


def keep_freed_memory() -> bool:
    """Let glibc serve large tensors from memory that earlier ones left, for the rest of the process.

    By default glibc maps every block above 32 MiB afresh and unmaps it when it is freed, so each large tensor of each
    step costs a page fault every 4 KiB: a sixth of a training step from 16,384 tokens on, in FAVOR+ and in the layers
    around it. Blocks taken from the heap instead are warm. The price is fragmentation: the process's peak may be about
    a quarter larger.

    Has no effect, and returns False, without glibc, or where the user chose an allocator or its settings themselves
    (any ``MALLOC_*`` or ``GLIBC_TUNABLES`` variable, or ``LD_PRELOAD``).
    """
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    global _keeping
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    _keeping = all(_mallopt(parameter, value) for parameter, value in settings)
    return _keeping


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Give large tensors back to the system when they are freed, as long as this lasts, although others are kept.

    For work whose memory must not depend on how long it goes on: blocks from the heap leave holes that the next one may
    not fit into, so that the peak of a process creeps up with the number of tensors that it has seen. Reading in tiles
    took as long either way. No effect without :func:`keep_freed_memory`.
    """
    if not _keeping:
        yield
        return
    _mallopt(_M_MMAP_MAX, _MOST_MAPPED)
    _mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_MAX, 0)


def _mallopt(parameter: int, value: int) -> bool:
    return bool(ctypes.CDLL(None).mallopt(parameter, value) == 1)
