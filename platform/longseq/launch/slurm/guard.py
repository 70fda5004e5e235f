"""The process next to each rank of a job that watches it, and passes on what it sees to the one next to rank 0.

It is forked before libraries are loaded, so it costs next to no memory, and it goes on where its rank is stopped or
hangs with the interpreter's lock. Until the ranks have met each guard judges its own rank alone; then rank 0's judges
all of them, and the others whether rank 0 still answers. See longseq.launch.watchdog for how they judge.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longseq.launch.slurm.place import Place
from longseq.launch.watchdog import LOOK_SECONDS, Finding, Judge, Look, Ward, keep_all, sentence, within
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training.worker import raise_open_files

NAME = "longseq-guard"  # of the process, as `ps -o comm` and `top` show it
_KEEP_SECONDS = 40.0  # for the stacks of all ranks
_ANSWER_SECONDS = 5.0  # of a guard that is told that the start ends; after that its machine is taken for lost
_CONNECT_SECONDS = 5.0
_NOTE_SECONDS = 20.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def fork_guard(rank: int, of: Callable[[], tuple[Run, Place]]) -> tuple[Ward, int]:
    """Have this process watched from now on. Before its first thread.

    of: says in the guard which run and place it is, as soon as that is known.

    Returns:
        what the two share, and on rank 0 the port where its guard hears the others.
    """
    ward = Ward(rank)
    ward.pid = os.getpid()
    listener = socket.create_server(("", 0)) if rank == 0 else None
    port = listener.getsockname()[1] if listener else 0
    if os.fork() == 0:
        try:
            with suppress(OSError):
                Path("/proc/self/comm").write_text(NAME)
            for number in _IGNORED:  # of the job's end: what they mean is the rank's to decide
                signal.signal(number, signal.SIG_IGN)
            raise_open_files()  # rank 0's has one for each rank
            _Guard(*of(), ward, listener).watch()
        except BaseException as error:
            ward.ends[0] = 0
            print(f"longseq: warning: rank {rank} is watched no more: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    if listener:
        listener.close()
    return ward, port


class _Guard:
    def __init__(self, run: Run, place: Place, ward: Ward, listener: socket.socket | None):
        self.run, self.place, self.ward, self.listener = run, place, ward, listener
        self.look = Look(run, Judge({place.rank: place.node}))
        self.met = False
        self.ending = self.follows = False  # rank 0's guard, which says when all is kept
        self.links: list[_Link] = []  # rank 0: to all others; else to rank 0's

    def watch(self) -> None:
        while os.getppid() == self.ward.pid:
            found = self._hear()
            if self.look.due():
                found = found or self._turn()
            if found:
                self._end(found)
                return
            self._wait()

    def _wait(self) -> None:
        """Until something has come, or a second has passed."""
        poll = select.poll()
        for link in self.links:
            poll.register(link.fileno(), select.POLLIN)
        if self.listener:
            poll.register(self.listener.fileno(), select.POLLIN)
        poll.poll(LOOK_SECONDS * 1e3)

    def _turn(self) -> Finding | None:
        """Once a second: look at the own rank, and tell the others."""
        facts = self.ward.facts()
        self.ward.keep_asked(self.run)
        if facts["sign"]["hub"] and not self.met:
            self.met = True
            nodes = {rank: self.place.node_of(rank) for rank in range(self.place.world if self.listener else 1)}
            # The others look at rank 0 alone, which says what it waits for: whether it answers is theirs to judge.
            self.look = Look(self.run, Judge(nodes, silence_only=not self.listener))
        judge = self.look.judge
        if self.place.rank in judge.pulses:
            judge.hear(self.place.rank, facts)
        if self.met and not self.links and not self.listener:
            self._connect(facts["sign"]["hub"])
        for link in list(self.links):
            if not link.send({"rank": self.place.rank, "facts": facts}):
                self.links.remove(link)
        return self.look()

    def _connect(self, hub: str) -> None:
        address, _, port = hub.rpartition(":")
        with suppress(OSError):  # the next second again, until rank 0 counts as silent
            self.links.append(_Link(socket.create_connection((address, int(port)), _CONNECT_SECONDS)))

    def _hear(self) -> Finding | None:
        """Take what has come from the others: facts, or that the start ends."""
        if self.listener:
            self.listener.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    self.links.append(_Link(self.listener.accept()[0]))
        for link in list(self.links):
            for line in link.lines():
                if "end" in line:
                    # Two that find it at once wait for each other, and rank 0's leads.
                    self.follows = not self.listener
                    link.told = True
                    if not self.ending:
                        return Finding(**line["end"])
                    link.send({"told": True})
                link.told, link.kept = link.told or "told" in line, link.kept or "kept" in line
                with suppress(LookupError, TypeError):  # no line of a guard
                    self.look.judge.hear(line["rank"], line["facts"])
            if link.closed:
                self.links.remove(link)
        return None

    def _end(self, found: Finding) -> None:
        """Keep what the ranks are doing, say so, and end them: the first that ends takes the others with it."""
        self.ending = True
        self.ward.ends[0] = 1
        for link in self.links:
            link.send({"told": True} if self.follows else {"end": asdict(found)})
        keep_all(self.run, [self.ward], found)
        for link in self.links:
            link.send({"kept": True})
        deadline = time.monotonic() + _KEEP_SECONDS
        while self._waits(deadline):
            self._wait()
            self._hear()
        if not self.follows:
            text = sentence(self.run, found.text)
            print(f"longseq: error: {text}", file=sys.stderr, flush=True)
            note = f"lost {text}"
            within(_NOTE_SECONDS, lambda: starts.note_end(self.run.starts_dir, self.run.start, note))
        if os.getppid() == self.ward.pid:
            os.kill(self.ward.pid, signal.SIGKILL)

    def _waits(self, deadline: float) -> bool:
        """Whether a guard that lives has not kept its rank's stacks yet, or, where another one leads, has not ended."""
        left = deadline - time.monotonic()
        slow = _KEEP_SECONDS - left < _ANSWER_SECONDS
        return left > 0 and any(self.follows or (not link.kept and (link.told or slow)) for link in self.links)


class _Link:
    """A connection to another guard: a line of JSON each time."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.closed = self.told = self.kept = False  # that the start ends; its rank's stacks
        self._rest = b""
        connection.setblocking(False)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, line: dict[str, Any]) -> bool:
        """Whether it could be sent: half a line would make the next ones unreadable."""
        data = json.dumps(line).encode() + b"\n"
        with suppress(OSError):
            return self.connection.send(data) == len(data)
        return False

    def lines(self) -> list[dict[str, Any]]:
        """What has come."""
        try:
            while data := self.connection.recv(1 << 16):
                self._rest += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._rest = self._rest.split(b"\n")
        found = []
        for line in lines:
            with suppress(ValueError):  # of somebody who has found the port
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]
