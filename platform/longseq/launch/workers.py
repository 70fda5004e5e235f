"""Processes that share work and never talk to each other: each leaves files in a folder, and none can wait in vain."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from longseq.errors import EXIT_ERROR, USER_ERRORS, LongseqError
from longseq.launch.local import environment_of, free_port
from longseq_data.os_errors import explained


class ToldError(LongseqError):
    """What one of the processes has said is wrong."""


class Workers:
    """``python -m MODULE PLACE PARENT`` so many times, each told its rank; all end with the block.

    Args:
        place: the folder that they share.
        world: how many.
    """

    def __init__(self, module: str, place: Path, world: int):
        self.module, self.place, self.world = module, place, world
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        for rank in range(self.world):
            _failure_path(self.place, rank).unlink(missing_ok=True)  # of an earlier start
            self.processes.append(self._started(rank))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def lost(self, done: Callable[[int], bool] = lambda rank: False) -> dict[int, str]:
        """The ranks that have ended without having done their work, and how; not those that are ``done`` for now.

        Raises:
            ToldError: with the sentence of one that has left one.
        """
        found = {}
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code in (None, 0) or done(rank):
                continue
            sentence = _failure_path(self.place, rank)
            if sentence.exists():
                raise ToldError(sentence.read_text(encoding="utf-8"))
            assert code is not None
            found[rank] = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        return found

    def ended(self) -> bool:
        """Whether all have done their work."""
        return all(process.poll() == 0 for process in self.processes)

    def start_again(self, rank: int) -> None:
        """In the place of one that was lost."""
        self.processes[rank] = self._started(rank)

    def _started(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.module, str(self.place), str(os.getpid())]
        # In a session of its own: a Ctrl-C is for the parent, which ends them.
        environment = environment_of(rank, self.world, self.port)
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def serve(work: Callable[[Path, int, int], None]) -> int:
    """One of the processes: ``work(place, rank, world)``, and the exit code. Its errors are left for the parent."""
    place, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _end_with_parent(int(sys.argv[2]))
    try:
        work(place, rank, world)
    except USER_ERRORS as error:
        sentence = str(error)
    except OSError as error:
        sentence = f"{explained(error, error.filename or place)}."
    else:
        return 0
    _failure_path(place, rank).write_text(sentence, encoding="utf-8")
    return EXIT_ERROR


def _failure_path(place: Path, rank: int) -> Path:
    return place / f"failure-{rank}.txt"


def _end_with_parent(parent: int) -> None:
    """Do not outlive a parent that was killed, before this process came so far even."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(EXIT_ERROR)

    threading.Thread(target=watch, daemon=True).start()
