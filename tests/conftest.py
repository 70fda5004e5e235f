"""Before anything is imported: how Triton runs here, and that Ctrl-C means what it does at a terminal."""

import gc
import os
import signal
import tempfile

import pytest
import torch

import longseq.allocator
import warm

# Without a GPU Triton's kernels are interpreted, which it decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A background job of a shell ignores Ctrl-C, and what it starts inherits that: the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Commands that tests call in this process must not make its heap keep what tests free: it would outgrow the machine's
# memory, of which each process that is forked afterwards has to be promised as much.
longseq.allocator._mallopt = lambda parameter, value: True

warm.install()

# Blocks of the tests' files, for all processes of this session.
_CACHE = tempfile.TemporaryDirectory(prefix="longseq-tests-", ignore_cleanup_errors=True)
os.environ["LONGSEQ_CACHE"] = _CACHE.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the job scripts that are compared with")


def pytest_collection_finish() -> None:
    """Collections of garbage, several in each training by Lightning, need not go through what lives to the end.

    That was most of what a tiny training took.
    """
    gc.collect()
    gc.freeze()
