"""The processes that watch the ranks of a job: who is named where a rank, or a whole node, stands still."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longseq.launch.slurm.guard import NAME
from longseq.runs import starts
from longseq.runs.run import Run

RANK = """
import signal, sys, time
from pathlib import Path
from longseq.launch.slurm.guard import fork_guard
from longseq.launch.slurm.place import Place
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training.vitals import Vitals, stacks_on_request

rank = int(sys.argv[1])
of = Run(Path(sys.argv[2]), 1), Place(rank, 0, 2, ("node1", "node2"), "127.0.0.1", 1)
ward, port = fork_guard(rank, lambda: of)
stacks_on_request(ward.stacks.fileno())
vitals = Vitals(ward.theirs)
vitals.hang_seconds = 6.0
print(port, flush=True)
vitals.hub = input()
went_on = []
signal.signal(signal.SIGCONT, lambda *_: went_on.append(1))
def trains():
    while time.monotonic() < ends:
        vitals.at("training")
        if went_on:  # to leave stacks: it finds its connections lost
            ward.wait_to_be_ended()
            starts.note_end(of[0].starts_dir, 1, "crashed: connection lost")
        time.sleep(0.05)
ends = time.monotonic() + float(sys.argv[3])
trains()
"""


class Job:
    """Two ranks on two nodes, which have met."""

    def __init__(self, folder: Path, seconds: float = 1000, *, meet: bool = True):
        self.run = Run(folder, 1)
        self.run.starts_dir.mkdir()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "-c", RANK]
        self.ranks = [
            subprocess.Popen([*command, str(rank), str(folder), str(seconds)], **pipes)  # type: ignore[call-overload]
            for rank in range(2)
        ]
        ports = [rank.stdout.readline().strip() for rank in self.ranks]
        assert ports[1] == "0"
        self.guards = [children(rank.pid)[0] for rank in self.ranks]
        for rank in self.ranks if meet else ():
            rank.stdin.write(f"127.0.0.1:{ports[0]}\n")
            rank.stdin.flush()
        if meet:  # both guards look once a second
            until(lambda: connected(int(ports[0])))
            time.sleep(2)

    def said(self) -> str:
        until(lambda: (self.run.starts_dir / "00001.end").exists())
        found = starts.read_end(self.run.starts_dir, 1)
        assert found is not None
        return found

    def close(self) -> None:
        for pid in [*self.guards, *(rank.pid for rank in self.ranks)]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.communicate()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.close()


def test_a_guard_costs_little_has_a_name_and_ends_with_its_rank(tmp_path, jobs):
    jobs.append(job := Job(tmp_path, seconds=6))
    for guard in job.guards:
        assert Path(f"/proc/{guard}/comm").read_text().strip() == NAME
        own = re.search(r"^Private_Dirty:\s+(\d+)", Path(f"/proc/{guard}/smaps_rollup").read_text(), re.M)
        assert own is not None
        assert int(own[1]) < 32 << 10  # KiB
    assert [rank.wait(60) for rank in job.ranks] == [0, 0]
    until(lambda: not any(Path(f"/proc/{guard}").exists() for guard in job.guards))
    assert starts.read_end(job.run.starts_dir, 1) is None


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_node_that_stands_still_as_a_whole_is_named_by_the_other(tmp_path, jobs, frozen):
    jobs.append(job := Job(tmp_path))
    for pid in (job.ranks[frozen].pid, job.guards[frozen]):
        os.kill(pid, signal.SIGSTOP)
    assert re.match(rf"lost node{frozen + 1}: rank {frozen} \(cpu\) has not answered for \d+ s", job.said())
    assert job.ranks[1 - frozen].wait(60) == -signal.SIGKILL
    assert "in trains" in job.run.stacks_of(1 - frozen).read_text()
    assert job.ranks[frozen].poll() is None


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_all_leave_their_stacks(tmp_path, jobs, stopped):
    jobs.append(job := Job(tmp_path))
    os.kill(job.ranks[stopped].pid, signal.SIGSTOP)
    said = job.said()
    assert re.match(
        rf"lost node{stopped + 1}: rank {stopped} \(cpu\) has not answered for \d+ s: stopped by a signal", said
    )
    assert f"What each rank was doing: {job.run.stacks_of('*')}" in said
    assert [rank.wait(60) for rank in job.ranks] == [-signal.SIGKILL] * 2
    for rank in range(2):
        assert "in trains" in job.run.stacks_of(rank).read_text()


def test_a_rank_that_is_stopped_before_it_has_met_the_others_is_named_by_its_own_guard(tmp_path, jobs):
    jobs.append(job := Job(tmp_path, meet=False))
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    assert job.said().startswith("lost node2: rank 1 (cpu) has not answered for ")
    assert job.ranks[1].wait(60) == -signal.SIGKILL
    assert job.ranks[0].poll() is None


def connected(port: int) -> bool:
    """Whether somebody has connected to a port of this machine."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[3] == "01" and int(row[2].partition(":")[2], 16) == port for row in rows)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
