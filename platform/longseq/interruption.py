"""Ctrl-C in a process of the command line, and SIGTERM while it has something to tidy up."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Hears SIGINT from now on, where Python would have.

    Before the work begins there is nothing to tidy up, and Python imports: in the middle of that an exception may be
    lost, or come out as another. So the process ends at once. Later SIGINT is a KeyboardInterrupt, as ever.
    """

    def __init__(self) -> None:
        self.happened = False
        self._working = False
        main = threading.current_thread() is threading.main_thread()
        # Not under nohup, nor in the background of a shell without jobs: there it is ignored.
        self.ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.ours:
            signal.signal(signal.SIGINT, self._hear)
            sys.unraisablehook = self._unraisable

    def work_begins(self) -> None:
        """From here on there is something to tidy up."""
        self._working = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.happened = True
        if not self._working:
            os._exit(130)
        raise KeyboardInterrupt

    def _unraisable(self, lost: object) -> None:
        """An exception that Python can only print, in a callback say: a Ctrl-C comes again."""
        if issubclass(lost.exc_type, KeyboardInterrupt):  # type: ignore[attr-defined]
            _thread.interrupt_main()
        else:
            sys.__unraisablehook__(lost)  # type: ignore[arg-type]


@contextmanager
def unwound() -> Iterator[None]:
    """Inside, SIGTERM ends the process as a Ctrl-C does, block by block: what is half done is removed."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # somebody else hears it
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
