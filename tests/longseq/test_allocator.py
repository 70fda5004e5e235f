"""Freed memory is kept for the next tensor, unless the user chose an allocator."""

import os
import platform
import subprocess
import sys

import pytest

# How much memory 20 tensors of 64 MiB, one after the other, touch for the first time; after as many before them.
_FAULTS = """
import resource, torch
from longseq.allocator import keep_freed_memory
kept = keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * 4096 / 2**26)
"""


# Every other block of a heap is freed: what the process has in memory before and after that is given back, in MiB.
_HOLES = """
from pathlib import Path
from longseq.allocator import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
blocks = [bytes([1]) * (1 << 20) for _ in range(200)]
del blocks[::2]
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) // 256
before = resident()
give_back_freed_memory()
print(before - resident(), set(map(len, blocks)) == {1 << 20} and all(set(block) == {1} for block in blocks))
"""


def faulted(**variables: str) -> tuple[bool, float]:
    """Whether memory is kept, and how many of the 20 tensors' sizes were faulted in."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, tensors = done.stdout.split()
    return kept == "True", float(tensors)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_large_tensors_reuse_the_memory_of_freed_ones():
    kept, tensors = faulted()
    assert kept
    assert tensors < 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_users_own_setting_of_malloc_stays():
    kept, tensors = faulted(MALLOC_ARENA_MAX="8")
    assert not kept
    assert tensors > 15


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the call is glibc's")
def test_memory_between_blocks_in_use_is_given_back():
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", _HOLES], env=environment, capture_output=True, text=True, check=True)
    freed, intact = done.stdout.split()
    assert (80 < int(freed) <= 100, intact) == (True, "True")
