"""What the kernel says of other processes of this machine, and what they are doing. No torch here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

STOPPED, STORAGE = "stopped", "storage"
_STATES = {"T": STOPPED, "t": STOPPED, "D": STORAGE, "Z": "gone", "X": "gone"}
_SILENT_SECONDS, _DUMP_SECONDS = 3.0, 10.0  # until a process writes its stacks; until it has written them
_QUIET_SECONDS, _BUSY_SECONDS = 0.2, 2.0  # without a byte: behind the last frame; behind another one
_TOOL_SECONDS = 8.0  # of gdb: the others wait so long for a rank that may never move again
_LAST = (b" in <module>\n", b" in _run_module_as_main\n")  # how whole stacks end: with the main thread
_MOST_BYTES = 4 << 20  # of the stacks of one process


def state(pid: int) -> str:
    """Of a process: "stopped" by a signal or a debugger, waiting for "storage", "gone", or "" for none of these."""
    try:
        return _STATES.get(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0], "")
    except OSError:
        return "gone" if Path("/proc/self").exists() else ""


def descendants(pid: int) -> Iterator[int]:
    """Its children, theirs, and so on."""
    with suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                if child != os.getpid():  # which watches its parent
                    yield child
                    yield from descendants(child)


def bytes_moved(pid: int) -> int:
    """Bytes that it and its descendants have read and written; 0 where the kernel does not count them."""
    total = 0
    for each in (pid, *descendants(pid)):
        with suppress(OSError, ValueError, IndexError):  # it has ended, or is another user's
            total += sum(int(line.split()[1]) for line in Path(f"/proc/{each}/io").read_text().splitlines()[:2])
    return total


def stacks(pid: int, file: BinaryIO, *, native: bool) -> str:
    """What a training process and its descendants are doing. One that was stopped goes on for it.

    file: where they write their Python stacks, see ``training.vitals.stacks_on_request``. native: also its frames that
    are not Python's, where a tool is installed that shows them.
    """
    parts = []
    for each in (pid, *descendants(pid)):
        parts.append(f"--- process {each}{' (a data worker, perhaps)' if each != pid else ''}: {_words(each)}\n")
        parts += [_threads(each), _native(each) if native and each == pid else ""]
        if not _listens(each):
            continue
        before = os.fstat(file.fileno()).st_size
        with suppress(OSError):
            os.kill(each, signal.SIGQUIT)
            os.kill(each, signal.SIGCONT)
        end = _settled(file, before)
        text = os.pread(file.fileno(), min(end - before, _MOST_BYTES), before).decode(errors="replace")
        parts.append(text or "no Python stack: it does not answer to a signal\n")
    return "".join(parts)


def _settled(file: BinaryIO, before: int) -> int:
    """The file's size once a process has written its stacks to it; the main thread's come last."""
    start = since = time.monotonic()
    size = before
    while (now := time.monotonic()) < start + (_DUMP_SECONDS if size > before else _SILENT_SECONDS):
        if (grown := os.fstat(file.fileno()).st_size) != size:
            size, since = grown, now
        elif size > before:
            whole = os.pread(file.fileno(), 64, max(size - 64, 0)).endswith(_LAST)
            if now - since > (_QUIET_SECONDS if whole else _BUSY_SECONDS):
                break
        time.sleep(0.02)
    return size


def _words(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _listens(pid: int) -> bool:
    """Whether the signal would not just end it: a compiler that was started is no Python of ours."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:")).split()[1]
        return bool(int(caught, 16) >> (signal.SIGQUIT - 1) & 1)
    return False


def _threads(pid: int) -> str:
    """Of each thread its name, state and where in the kernel it waits."""
    lines = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
            with suppress(OSError):
                name, rest = (task / "stat").read_text().partition("(")[2].rsplit(")", 1)
                waits = (task / "wchan").read_text().strip("0\n")
                lines.append(f"thread {task.name} {name}: state {rest.split()[0]}{f', in {waits}' if waits else ''}\n")
    return "".join(lines)


def _native(pid: int) -> str:
    """Stacks with their native frames, by a tool that is installed and may look; empty without one."""
    for command in (
        ["py-spy", "dump", "--native", "--nonblocking", "--pid", str(pid)],
        ["gdb", "--batch", "--nx", "-ex", "thread apply all backtrace 64", "-p", str(pid)],
    ):
        if shutil.which(command[0]):
            with suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True)
                return f"{command[0]}:\n{done.stdout}"
    return ""
