"""A rank that hangs is named, what all ranks are doing is kept, and the start ends as by a crash. No torch here.

Every rank tells a process of its own machine once a second where it is (longseq.training.vitals): on one machine the
one that started it, in a job one that it has forked (launch.slurm.guard). Two things are told apart:

    silent   a process that says nothing more: it is stopped, its machine hangs, or the network is cut
    stuck    no rank has gone on for so long: the one that has got least far keeps the others waiting

How long is long follows the steps: trainer.hang_seconds, or ten median steps where that is longer; ten times as much
between steps, and thirty times before the second step and while something compiles. Bytes that are read or written
between steps are a sign of life. Time is counted while this process runs: what stands still as a whole is suspended.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from longseq.launch import processes
from longseq.launch.gpu_settings import where_traces_are
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training.vitals import BETWEEN, TRACE, Sign
from longseq_data import children

LOOK_SECONDS = 1.0
_WARN_SECONDS = 30.0
_MUCH = 1 << 20  # bytes that are progress
_TRACE_SECONDS = 15.0
_ENDED_SECONDS = 150.0  # more than a guard may take for all of it
_KEEP_SECONDS = 60.0  # for files that may be on a disk that hangs


@dataclass
class Pulse:
    """What is known of one rank: what it said last, and what the kernel says of it."""

    sign: Sign = field(default_factory=Sign)
    state: str = ""
    stopped_worker: int = 0  # a process of its data loader
    moved: int = 0  # bytes
    silent: float = 0.0  # seconds without a new sign

    @property
    def place(self) -> tuple[int, int]:
        return self.sign.batch, self.sign.mark


@dataclass(frozen=True)
class Finding:
    """What a judge has to say."""

    text: str = ""
    ranks: Sequence[int] = ()  # that are to blame
    ends: bool = False  # whether the start ends by it


class Judge:
    """Judges by what has been heard of the ranks, as often as :meth:`look` is called.

    nodes: of each rank, by the names that the scheduler has for them. silence_only: whether a rank that says where it
    is counts as well.
    """

    def __init__(self, nodes: Mapping[int, str], *, silence_only: bool = False):
        self.nodes, self.silence_only = nodes, silence_only
        self.pulses = {rank: Pulse() for rank in nodes}
        self.still = 0.0  # seconds in which no rank has gone on

    def hear(self, rank: int, heard: Mapping[str, Any]) -> None:
        """Take what a :class:`Ward` has found."""
        pulse, sign = self.pulses[rank], Sign(**heard["sign"])
        if sign.beat != pulse.sign.beat:
            pulse.silent = 0.0
        if (sign.batch, sign.mark) != pulse.place or heard["moved"] - pulse.moved > _MUCH:
            self.still = 0.0
        if heard["moved"] - pulse.moved > _MUCH or sign.batch != pulse.sign.batch:
            pulse.moved = heard["moved"]
        pulse.sign, pulse.state, pulse.stopped_worker = sign, heard["state"], heard["stopped_worker"]

    def look(self, elapsed: float) -> Finding:
        """What there is to say after so many more seconds: nothing, mostly."""
        self.still += elapsed
        if any(not pulse.sign.silence for pulse in self.pulses.values()):
            return Finding()  # trainer.hang_seconds=0
        silent, ends = [], False
        for rank, pulse in self.pulses.items():
            if pulse.state == "gone":  # whoever started it sees that
                continue
            pulse.silent += elapsed
            limit = pulse.sign.silence * (BETWEEN if pulse.state == processes.STORAGE else 1)
            if pulse.silent >= min(_WARN_SECONDS, limit):
                silent.append(rank)
                ends = ends or pulse.silent >= limit
        if silent:
            since = max(self.pulses[rank].silent for rank in silent)
            states = {self.pulses[rank].state for rank in silent}
            why = {frozenset({processes.STOPPED}): ": stopped by a signal or a debugger"}.get(frozenset(states), "")
            if states == {processes.STORAGE}:
                why = ": waiting for storage"
            return Finding(f"{self._named(silent)} not answered for {since:.0f} s{why}", silent, ends)
        return Finding() if self.silence_only else self._stuck()

    def _stuck(self) -> Finding:
        held = [rank for rank, pulse in self.pulses.items() if pulse.sign.waits_for_data and pulse.stopped_worker]
        least = min(pulse.place for pulse in self.pulses.values())
        behind = [rank for rank in held if self.pulses[rank].place == least] or [
            rank for rank, pulse in self.pulses.items() if pulse.place == least
        ]
        pulses = [self.pulses[rank] for rank in behind]
        limit = pulses[0].sign.silence if held else max(pulse.sign.limit for pulse in pulses)
        if self.still < limit:
            return Finding()
        where = f", {_doing(pulses[0])}" if len({pulse.sign.doing for pulse in pulses}) == 1 else ""
        if len(behind) < len(self.pulses):
            text = f"{self._named(behind)} kept the others waiting for {self.still:.0f} s{where}"
        elif len(self.pulses) == 1:
            text = f"{self._named(behind)} not gone on for {self.still:.0f} s{where}"
        else:
            nodes = ", ".join(dict.fromkeys(self.nodes.values()))
            text = f"{nodes}: no rank has gone on for {self.still:.0f} s, all at the same place{where}"
            behind = []
        return Finding(text, behind, ends=True)

    def _named(self, ranks: Sequence[int]) -> str:
        """ "node2: rank 3 (cuda:1), 4 (cuda:2) have" """
        nodes = ", ".join(dict.fromkeys(self.nodes[rank] for rank in ranks))
        names = ", ".join(f"{rank} ({self.pulses[rank].sign.device})" for rank in ranks)
        return f"{nodes}: rank {names} {'has' if len(ranks) == 1 else 'have'}"


def _doing(pulse: Pulse) -> str:
    if pulse.sign.waits_for_data and pulse.stopped_worker:
        return f"waiting for its data worker (process {pulse.stopped_worker}), which is stopped"
    return f"at {pulse.sign.doing}"


class Ward:
    """One rank of this machine, as the process that watches it sees it.

    Attributes:
        theirs: the end of the channel that the rank has.
        ends: a byte that a forked guard shares with its rank: not 0 once the guard has found why the start ends.
        stacks: an open file without a name, which the rank writes its stacks to.
    """

    def __init__(self, rank: int):
        self.rank, self.pid = rank, 0
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.ends = mmap.mmap(-1, 1)
        self.stacks: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the rank lives
        fcntl.fcntl(self.stacks, fcntl.F_SETFL, os.O_APPEND)  # the rank and its loader's processes write to it
        self.sign: dict[str, Any] = Sign().__dict__
        self.answers = False  # when its stacks were asked for, by a thread: so it can leave its collectives, too
        self._read = 0  # bytes of the stacks

    def close(self) -> None:
        for each in (self.ours, self.theirs, self.stacks, self.ends):
            each.close()

    def wait_to_be_ended(self) -> None:
        """In the rank: wait where its guard is keeping stacks and will end it, as only that knows the cause.

        A rank that was stopped goes on for its stacks, and finds its connections lost.
        """
        deadline = time.monotonic() + _ENDED_SECONDS
        while self.ends[0] and time.monotonic() < deadline:
            time.sleep(0.1)

    def hear(self) -> None:
        """Take what it has said."""
        with suppress(BlockingIOError):  # all was heard
            while True:
                self.sign = json.loads(self.ours.recv(1 << 12))

    def facts(self) -> dict[str, Any]:
        """What it has said last, and what the kernel says of it, for :meth:`Judge.hear`."""
        self.hear()
        waits = self.sign["waits_for_data"]
        stopped = [pid for pid in processes.descendants(self.pid) if processes.state(pid) == processes.STOPPED]
        return {
            "sign": self.sign,
            "state": processes.state(self.pid),
            "stopped_worker": stopped[0] if waits and stopped else 0,
            "moved": processes.bytes_moved(self.pid),
        }

    def keep(self, run: Run, finding: Finding) -> None:
        """Keep its stacks in the run's folder, as they come, and ask for its last collectives."""
        with suppress(OSError), run.stacks_of(self.rank).open("w") as file:  # for people
            file.write(f"{finding.text}\n\nrank {self.rank}, {self.sign}\n")
            for part in processes.stacks(self.pid, self.stacks, native=self.rank in finding.ranks):
                self.answers = self.answers or children.END_OF_STACKS.format(self.pid) in part
                file.write(part)
                file.flush()
        self._read = os.fstat(self.stacks.fileno()).st_size
        with suppress(OSError):  # it has ended, or reads nothing any more
            self.ours.send(TRACE)

    def keep_asked(self, run: Run) -> None:
        """Keep the stacks that somebody else has asked for, by a signal."""
        size = os.fstat(self.stacks.fileno()).st_size
        if size > self._read:
            data = os.pread(self.stacks.fileno(), size - self._read, self._read)
            with suppress(OSError), run.stacks_of(self.rank).open("ab") as file:  # for people
                file.write(data)
            self._read = size


class Look:
    """Reads the clock for a judge, and says what it says: once, and in a file for ``longseq status`` while it holds."""

    def __init__(self, run: Run, judge: Judge):
        self.run, self.judge = run, judge
        self.before, self.said = time.monotonic(), False

    def due(self) -> bool:
        return time.monotonic() - self.before >= LOOK_SECONDS

    def __call__(self) -> Finding | None:
        """What the start ends by; None if it goes on."""
        now = time.monotonic()
        elapsed, self.before = min(now - self.before, 2 * LOOK_SECONDS), now  # this process may have been stopped
        found = self.judge.look(elapsed)
        if bool(found.text) != self.said:
            self.said = bool(found.text)
            threading.Thread(target=self._tell, args=(found.text, found.ends), daemon=True).start()  # disks hang, too
        return found if found.ends else None

    def _tell(self, text: str, ends: bool) -> None:
        silent = starts.path_of(self.run.starts_dir, self.run.start, "silent")
        with suppress(OSError):  # for people
            if text:
                silent.write_text(f"{text}\n")
                if not ends:
                    then = "the start ends if it stays so (trainer.hang_seconds)"
                    print(f"longseq: warning: {text}; {then}.", file=sys.stderr, flush=True)
            else:
                silent.unlink(missing_ok=True)
                print("longseq: all ranks answer again.", file=sys.stderr, flush=True)


def keep_all(run: Run, wards: Sequence[Ward], finding: Finding) -> None:
    """Keep what the ranks of this process are doing; gives up where the disk hangs."""
    # What was stopped goes on for it: those that it has kept waiting are asked before.
    order = sorted(wards, key=lambda ward: ward.rank in finding.ranks)

    def keep() -> None:
        for ward in order:
            ward.keep(run, finding)

    within(_KEEP_SECONDS, keep)
    deadline = time.monotonic() + _TRACE_SECONDS
    while any(ward.answers and not ward.sign["traced"] for ward in wards) and time.monotonic() < deadline:
        time.sleep(0.05)
        for ward in wards:
            ward.hear()


def sentence(run: Run, text: str) -> str:
    """For people, once everything is kept."""
    stacks = run.stacks_of("*")
    where = f" What each rank was doing: {stacks}." if any(stacks.parent.glob(stacks.name)) else ""
    return f"{text} (trainer.hang_seconds).{where}{where_traces_are(run)}"


def within(seconds: float, work: Callable[[], object]) -> None:
    """Do something that may never end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
