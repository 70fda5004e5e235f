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
from types import FrameType
from typing import Any

# The empty entry is the working directory, where a pickle.py may lie.
_BEGIN = (
    "import sys; sys.path = [place for place in sys.path if place]; import pickle; "
    "sys.path = pickle.load(sys.stdin.buffer); from longseq_data.children import stacks_on_request; "
    "stacks_on_request(); from {0} import work; work()"
)
# Names the file where processes leave their Python stacks when they are sent SIGQUIT: a training process sets it.
STACKS = "LONGSEQ_STACKS"
END_OF_STACKS = "--- end of the Python stacks of process {0}\n"
# The second resort, where an extension keeps the interpreter's lock for ever: faulthandler answers it without the lock.
# It is not the first, because it reads the frames of threads that run meanwhile, and has ended processes by that.
# None on systems without real-time signals.
HELD: int | None = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else None
_MOST_FRAMES = 100  # of a thread, as faulthandler has it
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
    """Leave the stacks of all threads where ``STACKS`` says, on SIGQUIT. To be called by the main thread.

    A thread of its own writes them: the kernel's signal wakes it at once, whatever the main thread waits for.
    """
    if STACKS not in os.environ:  # nobody asks
        return
    with suppress(OSError):  # what the parent had there is gone
        file = os.open(os.environ[STACKS], os.O_WRONLY | os.O_APPEND)
        if HELD is not None:
            faulthandler.register(HELD, file=file, all_threads=True)
        asked, ask = os.pipe()
        os.set_blocking(ask, False)
        threading.Thread(target=_leave_stacks, args=(asked, file), name="stacks", daemon=True).start()
        signal.set_wakeup_fd(ask, warn_on_full_buffer=False)
        signal.signal(signal.SIGQUIT, _nothing)
        os.register_at_fork(after_in_child=_no_thread_answers)


def _nothing(*_: object) -> None:
    """A handler, without which no signal reaches the wakeup descriptor."""


def _no_thread_answers() -> None:
    """In a fork: its signals must not wake the parent's thread. faulthandler still answers there."""
    with suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def _leave_stacks(asked: int, file: int) -> None:
    while numbers := os.read(asked, 64):
        if signal.SIGQUIT in numbers:
            rest = memoryview(_python_stacks().encode())
            with suppress(OSError):  # for people
                while rest:
                    rest = rest[os.write(file, rest) :]


def _python_stacks() -> str:
    """Of all threads but this one, the main thread's first. Keeps no frame, and so nothing that one refers to."""
    names = {ident: thread.name for ident, thread in threading._active.copy().items()}  # type: ignore[attr-defined]
    main, frames = threading.main_thread().ident, sys._current_frames()
    del frames[threading.get_ident()]  # which would refer to itself, and be freed with all others only some time later
    lines = [f"Python stacks of process {os.getpid()}, innermost call first:\n"]
    for ident in sorted(frames, key=lambda ident: ident != main):
        lines.append(f"Thread {names.get(ident, hex(ident))}:\n")
        frame: FrameType | None = frames[ident]
        for _ in range(_MOST_FRAMES):
            if frame is None:
                break
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}\n')
            frame = frame.f_back
    return "".join((*lines, END_OF_STACKS.format(os.getpid())))


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
