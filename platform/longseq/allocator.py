"""CPU memory between steps: freed tensors stay with the process instead of going back to the system."""

from __future__ import annotations

import ctypes
import os
import platform

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


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
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(_mallopt(parameter, value) for parameter, value in settings)


def give_back_freed_memory() -> None:
    """Let glibc return what was freed to the system, page by page: the counterpart, for work of unbounded length.

    Small and large blocks taken in turn leave holes that the next large one does not fit into, so that a process's
    peak creeps up with the number of tensors it has seen. Costs about a millisecond for 100 MB. No effect elsewhere.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(parameter: int, value: int) -> bool:
    return bool(ctypes.CDLL(None).mallopt(parameter, value) == 1)
