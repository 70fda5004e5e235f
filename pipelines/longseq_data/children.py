"""Python processes that work for this one, each started anew and in a moment.

A fork would take over the locks of its parent's threads in whatever state they are, and its handlers of signals.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# The empty entry is the working directory, where a pickle.py may lie.
_BEGIN = (
    "import sys; sys.path = [place for place in sys.path if place]; import pickle; "
    "sys.path = pickle.load(sys.stdin.buffer); from longseq_data.children import stacks_on_request; "
    "stacks_on_request(); from {0} import work; work()"
)
# Names the file where processes leave their Python stacks when they are sent SIGQUIT: a training process sets it.
STACKS = "LONGSEQ_STACKS"
# What a scheduler or a terminal sends to all processes of a job is meant for the parent, which ends its own itself.
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start(module: str, given: object, **options: Any) -> subprocess.Popen[bytes]:
    """A process that calls ``work()`` of a module, which finds ``given``, pickled, on its standard input.

    options: of subprocess.Popen. Raises OSError.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)  # what a new process inherits
    try:
        begin = [sys.executable, "-c", _BEGIN.format(module)]
        process = subprocess.Popen(begin, stdin=subprocess.PIPE, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    send(process, pickle.dumps(sys.path) + pickle.dumps(given))
    return process


def stacks_on_request() -> None:
    """Leave the stacks of all threads where ``STACKS`` says, on SIGQUIT, also while no Python runs."""
    with suppress(KeyError, OSError):  # nobody asks, or what the parent had there is gone
        descriptor = os.open(os.environ[STACKS], os.O_WRONLY | os.O_APPEND)
        faulthandler.register(signal.SIGQUIT, file=descriptor, all_threads=True)


def end_with_parent(tidy: Callable[[], object] = bool) -> threading.Thread:
    """Have this process end when its standard input does, as its parent's death closes it; ``tidy`` is done before."""

    def end() -> None:
        tidy()
        os._exit(0)

    return end_when_closed(sys.stdin.fileno(), end)


def end_when_closed(pipe: int, end: Callable[[], object]) -> threading.Thread:
    """Call ``end``, which ends this process, when the other end of a pipe closes: who held it was killed perhaps."""

    def wait() -> None:
        while os.read(pipe, 1 << 16):
            pass
        end()

    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    return watcher


def send(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Write to its standard input; of one that has ended nothing comes back, which says so."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(data)
        process.stdin.flush()
