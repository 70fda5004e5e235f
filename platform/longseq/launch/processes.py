"""What the kernel says of other processes of this machine, and what they are doing. No torch here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from longseq_data import children

STOPPED, STORAGE = "stopped", "storage"
_STATES = {"T": STOPPED, "t": STOPPED, "D": STORAGE, "Z": "gone", "X": "gone"}
_SILENT_SECONDS, _DUMP_SECONDS = 5.0, 10.0  # without a byte of the stacks that were asked for; for all of them
_HELD_SECONDS = 2.0  # until faulthandler begins, which waits for nothing but a processor
_QUIET_SECONDS, _BUSY_SECONDS = 0.2, 2.0  # of faulthandler's without a byte: behind its last frame; behind another one
_TOOL_SECONDS = 8.0  # of gdb: the others wait so long for a rank that may never move again
_LAST = (b" in <module>\n", b" in _run_module_as_main\n")  # how faulthandler's end: with the main thread
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


def stacks(pid: int, file: BinaryIO, *, native: bool) -> Iterator[str]:
    """What a training process and its descendants are doing, part by part. One that was stopped goes on for it.

    file: where they write their Python stacks, see ``training.vitals.stacks_on_request``. native: also its frames that
    are not Python's, where a tool is installed that shows them.
    """
    everyone = (pid, *descendants(pid))
    for each in everyone:
        yield f"--- process {each}{' (a data worker, perhaps)' if each != pid else ''}: {_words(each)}\n"
        yield _threads(each)
        if native and each == pid:
            yield _native(each)
    before = os.fstat(file.fileno()).st_size
    asked = [each for each in everyone if _ask(each, signal.SIGQUIT)]
    silent = _not_answered(asked, file, before)
    held = [each for each in everyone if each in silent or each not in asked]
    yield _written(file, before)
    for each in held:
        before = os.fstat(file.fileno()).st_size
        if children.HELD is not None and state(each) != STORAGE and _ask(each, children.HELD):
            _settled(file, before)
        if text := _written(file, before):
            yield f"process {each}, which keeps the interpreter's lock:\n{text}"
        elif each in silent:
            yield f"process {each}: no Python stack: it does not answer to a signal\n"


def _ask(pid: int, number: int) -> bool:
    """Send a process a signal if that would not just end it: a compiler that was started is no Python of ours."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:")).split()[1]
        if not int(caught, 16) >> (number - 1) & 1:
            return False
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
    except (OSError, StopIteration, ValueError):  # it has ended
        return False
    return True


def _not_answered(pids: Iterable[int], file: BinaryIO, before: int) -> set[int]:
    """Those of the processes that have not written all their stacks to the file in time."""
    start = since = time.monotonic()
    size, silent = before, set(pids)
    while silent and (now := time.monotonic()) < min(since + _SILENT_SECONDS, start + _DUMP_SECONDS):
        if (grown := os.fstat(file.fileno()).st_size) != size:
            size, since = grown, now
            text = _written(file, before)
            silent = {pid for pid in silent if children.END_OF_STACKS.format(pid) not in text}
        time.sleep(0.02)
    return silent


def _written(file: BinaryIO, before: int) -> str:
    return os.pread(file.fileno(), _MOST_BYTES, before).decode(errors="replace")


def _settled(file: BinaryIO, before: int) -> None:
    """Wait until faulthandler has written its stacks to the file, which end nowhere but with the main thread's."""
    start = since = time.monotonic()
    size = before
    while (now := time.monotonic()) < start + (_DUMP_SECONDS if size > before else _HELD_SECONDS):
        if (grown := os.fstat(file.fileno()).st_size) != size:
            size, since = grown, now
        elif size > before:
            whole = os.pread(file.fileno(), 64, max(size - 64, 0)).endswith(_LAST)
            if now - since > (_QUIET_SECONDS if whole else _BUSY_SECONDS):
                break
        time.sleep(0.02)


def _words(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


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
