"""The starts of a run, numbered; only the newest writes to the run's folder. No torch here.

    starts/00003.start   made by one process alone, with what is starting: a start has this number from then on. On a
                         second line a local one says which process it is (see longseq.runs.owner)
    starts/00003.step    where it is: "step last-step loss tokens-per-second seconds-since-1970"
    starts/00003.end     how it ended, in a job: "finished", "saved", "error WHY", "preflight WHY", "crashed WHY" or
                         "lost WHY", where WHY begins with the nodes to blame
    starts/00003.port    on which port rank 0 listens, in a job on several processes
    starts/00003.silent  which rank does not answer, in a job, as long as one does not
    starts/00003.crash   after which step it crashed, in a job, "never" before the first, and the nodes to blame

Jobs of other verbs number theirs in a folder of their own, ``slurm/evaluate-JOB.fence``, and tell their processes
which one is theirs by the variable OWN.

A lost node's processes can live on during the job's next start, and a slow network file system lets a lock of theirs
be forgotten. They look for a newer number before each file that they write. Besides, one process of each node looks
every ten seconds and ends where there is one: the others of its node follow, as it leaves its place to the next. For
points of the curves that is enough.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from longseq.errors import EXIT_SUPERSEDED, SupersededError

_START = re.compile(r"(\d{5,})\.start")
POLL_SECONDS = 10.0
OWN = "LONGSEQ_START"  # path of the start's file that a job's processes belong to; a training's are told by arguments


@dataclass(frozen=True)
class Progress:
    """Where a start is."""

    step: int
    last_step: int
    loss: float  # of the last point in TensorBoard; NaN before it
    tokens_per_second: float
    time: float  # when that was


def numbers(folder: Path) -> list[int]:
    """The starts so far, oldest first."""
    try:
        # A listing asks the server of a network file system anew; a look for one name may not.
        names = os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _START.fullmatch(name)))


def take(folder: Path, what: str) -> int:
    """Become the newest start: its number."""
    folder.mkdir(exist_ok=True)
    while True:
        number = max(numbers(folder), default=0) + 1
        try:
            with path_of(folder, number, "start").open("x", encoding="utf-8") as file:
                file.write(f"{what}\n")
        except FileExistsError:
            continue  # another one was faster
        return number


def check(folder: Path, number: int) -> None:
    """Refuse to go on where a newer start has the run.

    Raises:
        SupersededError: naming both.
    """
    newest = max(numbers(folder), default=number)
    if newest > number:
        raise SupersededError(
            f"{folder.parent if folder.name == 'starts' else folder}: start {newest} has this run now, so start "
            f"{number} writes nothing more to it and ends."
        )


def watch(folder: Path, number: int, say: Callable[[str], object]) -> None:
    """End this process, from a thread of its own, soon after a newer start has the run, whatever it waits for.

    Of the processes of one start on one node, one alone lists ``folder``; when it has ended, the next one does.

    say: gets the sentence that says so.
    """

    address = b"\0longseq-" + hashlib.sha256(f"{folder.resolve()} {number}".encode()).hexdigest().encode()

    def look() -> None:
        place = None
        while True:
            time.sleep(POLL_SECONDS)
            try:
                place = place or _take_place(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue  # another process of this node looks
                # Of a system without such names: each process looks for itself.
            try:
                check(folder, number)
            except SupersededError as error:
                with suppress(Exception):
                    say(str(error))
                os._exit(EXIT_SUPERSEDED)
            except OSError:  # of a file system that is away for a moment
                continue

    threading.Thread(target=look, name="watch-starts", daemon=True).start()


def check_own() -> None:
    """:func:`check` for the start of the job that this process belongs to, if it belongs to one, before it writes.

    Raises:
        SupersededError: if it is not the newest any more.
    """
    if found := own():
        check(*found)


def watch_own(say: Callable[[str], object]) -> None:
    """:func:`watch` for the start of the job that this process belongs to, if it belongs to one."""
    if found := own():
        watch(*found, say)


def own() -> tuple[Path, int] | None:
    """The folder and number of the start of the job that this process belongs to; None where it belongs to none."""
    path = Path(os.environ.get(OWN, ""))
    match = _START.fullmatch(path.name)
    return (path.parent, int(match[1])) if match else None


def _take_place(address: bytes) -> socket.socket:
    """Become the process of this node that looks: the kernel gives an abstract address to one, and back at its end.

    Raises:
        OSError: EADDRINUSE, where another process has it.
    """
    place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        place.bind(address)
    except OSError:
        place.close()
        raise
    os.register_at_fork(after_in_child=place.close)  # a loader's worker may outlive us
    return place


def path_of(folder: Path, number: int, what: str) -> Path:
    """A start's file ``start``, ``step``, ``end`` or ``crash``."""
    return folder / f"{number:05d}.{what}"


def text_of(folder: Path, number: int, what: str) -> str:
    """What such a file says; a byte that a disk has damaged is a sign of its own, and ends nothing."""
    return path_of(folder, number, what).read_text(encoding="utf-8", errors="replace")


def note_progress(folder: Path, number: int, progress: Progress) -> None:
    """Leave a start's progress where others find it; not synced, so that it costs next to nothing."""
    line = f"{progress.step} {progress.last_step} {progress.loss:.6g} {progress.tokens_per_second:.6g} "
    # One write of one length, so that a reader sees the old line or the new one.
    content = f"{line}{progress.time:.0f}".ljust(95) + "\n"
    descriptor = os.open(path_of(folder, number, "step"), os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, content.encode(), 0)
    finally:
        os.close(descriptor)


def read_progress(folder: Path, number: int) -> Progress | None:
    """Where a start was when it last said so; None before its first step."""
    try:
        step, last, loss, rate, when = text_of(folder, number, "step").split()
        return Progress(int(step), int(last), float(loss), float(rate), float(when))
    except (FileNotFoundError, ValueError):
        return None


def note_end(folder: Path, number: int, verdict: str) -> None:
    """Say how a start ended, unless another of its processes has said so before: the first one knows the cause."""
    try:
        with path_of(folder, number, "end").open("x", encoding="utf-8") as file:
            file.write(" ".join(verdict.split()) + "\n")
    except OSError:  # there already, or no room for it: then it counts as a crash
        return


def read_end(folder: Path, number: int) -> str | None:
    """How a start ended, if it said so."""
    try:
        return text_of(folder, number, "end").strip() or None
    except FileNotFoundError:
        return None
