"""What a process prints, on its terminal and in a log that `longseq logs` shows."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from longseq_data.os_errors import explained

_BAR_SECONDS = 10.0  # between two states of a progress bar that are kept


def keep_output(log: Path) -> None:
    """Write stdout and stderr of this process also to the end of ``log``; where that cannot be written, say so."""
    try:
        log.parent.mkdir(exist_ok=True)
        kept = log.open("a", encoding="utf-8", errors="replace", buffering=1)
    except OSError as error:
        what = explained(error, log, "cannot be written, so `longseq logs` will not show what is said here")
        print(f"longseq: warning: {what}.", file=sys.stderr, flush=True)
    else:
        sys.stdout, sys.stderr = _Kept(sys.stdout, kept), _Kept(sys.stderr, kept)


class _Kept:
    """A stream whose lines are kept. Of a line that is written again and again, a bar, its last state now and then."""

    def __init__(self, stream: TextIO, log: TextIO):
        self._stream, self._log = stream, log
        self._line, self._wrote = "", time.monotonic()

    def write(self, text: str) -> int:
        self._keep(text)
        return self._stream.write(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _keep(self, text: str) -> None:
        *lines, last = (self._line + text).split("\n")
        for line in lines:
            self._put(line.removesuffix("\r").rpartition("\r")[2])
        shown = last.rpartition("\r")[0].rpartition("\r")[2]
        if shown.strip() and time.monotonic() - self._wrote > _BAR_SECONDS:
            self._put(shown)
        self._line = last.rpartition("\r")[2]

    def _put(self, line: str) -> None:
        self._wrote = time.monotonic()
        with suppress(OSError, ValueError):  # a full disk is said by what needs it
            self._log.write(f"{line}\n")
