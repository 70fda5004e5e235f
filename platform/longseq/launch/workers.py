"""Processes that share work and never talk to each other: each leaves files in a folder, and none can wait in vain."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from longseq.errors import EXIT_ERROR, USER_ERRORS, LongseqError, PassingError
from longseq.launch.local import environment_of, free_port
from longseq_data.errors import DataError
from longseq_data.os_errors import explained, may_pass

_OF_DATA, _PASSING, _OTHER = "data", "passing", "other"
_MOST = 1 << 16  # bytes of a sentence: what a pipe holds, so that nobody waits for a reader


class Workers:
    """``python -m MODULE PLACE PARENT PIPE`` so many times, each told its rank; all end with the block.

    What is wrong comes through a pipe: on a disk that is full no file could say so.

    Args:
        place: the folder that they share.
        devices: how many.
        node: of several nodes with as many each, which one this is.
        nodes: how many nodes.
    """

    def __init__(self, module: str, place: Path, devices: int, node: int = 0, nodes: int = 1):
        self.module, self.place, self.devices = module, place, devices
        self.first, self.world = node * devices, nodes * devices
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes: dict[int, int] = {}

    def __enter__(self) -> Workers:
        try:
            for rank in range(self.devices):
                self.processes.append(self._started(rank))
        except BaseException:  # no more processes may be started, or a Ctrl-C
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        while self.pipes:
            os.close(self.pipes.popitem()[1])

    def lost(self) -> dict[int, str]:
        """The ranks that have ended without having done their work, and how.

        Raises:
            DataError: with the sentence of one that has found bad data.
            LongseqError: with that of one that cannot go on for another reason; PassingError where that may pass.
        """
        found = {}
        for rank, process in enumerate(self.processes, self.first):
            code = process.poll()
            if code in (None, 0):
                continue
            kind, _, sentence = self._said(rank).partition(" ")
            if sentence:
                raise {_OF_DATA: DataError, _PASSING: PassingError}.get(kind, LongseqError)(sentence)
            assert code is not None
            found[rank] = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        return found

    def ended(self) -> bool:
        """Whether all have done their work."""
        return all(process.poll() == 0 for process in self.processes)

    def start_again(self, rank: int) -> None:
        """In the place of one that was lost."""
        self.processes[rank - self.first] = self._started(rank - self.first)

    def _started(self, local: int) -> subprocess.Popen[bytes]:
        rank = self.first + local
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        if rank in self.pipes:
            os.close(self.pipes[rank])
        self.pipes[rank] = reading
        command = [sys.executable, "-m", self.module, str(self.place), str(os.getpid()), str(writing)]
        environment = environment_of(local, self.devices, self.port)
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(self.world)}
        try:
            # In a session of its own: a Ctrl-C is for the parent, which ends them.
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[writing]
            )
        finally:
            os.close(writing)

    def _said(self, rank: int) -> str:
        """The last words of one that has ended: kind and sentence, or nothing."""
        with suppress(KeyError, BlockingIOError):  # it said nothing
            return os.read(self.pipes[rank], _MOST).decode(errors="replace")
        return ""


def serve(work: Callable[[Path, int, int], None]) -> int:
    """One of the processes: ``work(place, rank, world)``, and the exit code. Its errors are told to the parent."""
    place, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _end_with_parent(int(sys.argv[2]))
    kind = _OTHER
    try:
        work(place, rank, world)
    except USER_ERRORS as error:
        kind, sentence = _OF_DATA if isinstance(error, DataError) else kind, str(error)
        kind = _PASSING if isinstance(error, PassingError) else kind
    except OSError as error:
        kind = _PASSING if may_pass(error) else kind
        sentence = f"{explained(error, error.filename or place)}."
    else:
        return 0
    os.write(int(sys.argv[3]), f"{kind} {sentence}".encode()[:_MOST])
    return EXIT_ERROR


def _end_with_parent(parent: int) -> None:
    """Do not outlive a parent that was killed, before this process came so far even."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(EXIT_ERROR)

    threading.Thread(target=watch, daemon=True).start()
