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


# MiB that 100 tensors of 1 MiB take, every other one of which is freed.
_HOLES = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from longseq.allocator import freed_at_once, keep_freed_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) / 256
assert keep_freed_memory()
if sys.argv[1] == "behind":
    with freed_at_once():
        torch.ones(2**18)
before = resident()
with freed_at_once() if sys.argv[1] == "inside" else nullcontext():
    tensors = [torch.ones(2**18) for _ in range(100)]
    del tensors[::2]
    print(resident() - before, all(bool((tensor == 1).all()) for tensor in tensors))
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.parametrize(("where", "least", "most"), [("inside", 49, 60), ("outside", 95, 120), ("behind", 95, 120)])
def test_freed_memory_is_given_back_at_once_where_that_is_asked_for(where, least, most):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    code = [sys.executable, "-c", _HOLES, where]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    resident, whole = done.stdout.split()
    assert (least < float(resident) < most, whole) == (True, "True"), done.stdout
