"""Ctrl-C in a process of the command line."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
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
