"""Faults drawn at random in one run on two nodes: each is noticed and named, and the weights are those of a quiet run.

    LONGSEQ_FAULTS=60 LONGSEQ_FAULTS_SEED=1 pytest -m long tests/cluster/test_faults.py -n 0

About 40 s a fault, most of it the start after it. What was seen is printed, and the share of time that was kept: faults
that follow each other in LONGSEQ_FAULTS_STEPS=40 steps leave more of it than those that come every 8.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.disk import Disk
from cluster.slurm import Cluster, missing
from command_line import checkpoint, checkpoints, curve, largest_difference, longseq
from longseq.runs import starts
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

from .conftest import SITE, TINY, Login

pytestmark = [pytest.mark.distributed, pytest.mark.long]

COUNT, SEED = int(os.environ.get("LONGSEQ_FAULTS", "10")), int(os.environ.get("LONGSEQ_FAULTS_SEED", "0"))
KINDS = ("stopped", "killed", "slow", "lost node", "storage")
TOKENS = 24576
KEYS = (f"data.batch_tokens={TOKENS}", "trainer.zero_stage=2", "trainer.valid_every=0")
BETWEEN = int(os.environ.get("LONGSEQ_FAULTS_STEPS", "8"))  # steps from one to the next
HANG_SECONDS, STALL_SECONDS, LIMIT = 20, 40, 60.0


@dataclass(frozen=True)
class Fault:
    """What was seen of one, in seconds."""

    kind: str
    step: int
    noticed: float  # until somebody had said so, with the name of the rank or node
    again: float  # until there was a new step
    repeated: int  # steps

    def __str__(self) -> str:
        noticed = "over" if self.kind == "storage" else "noticed"
        times = f"{noticed} after {self.noticed:.1f} s, a step again after {self.again:.1f} s, {self.repeated} repeated"
        return f"{self.kind:10} at step {self.step:5}: {times}"


class Story:
    """A run, and what is done to it."""

    def __init__(self, login: Login, disk: Disk, job: str, run: Path, draw: random.Random):
        self.login, self.disk, self.job, self.run, self.draw = login, disk, job, run, draw
        self.blamed = ""
        self.does: dict[str, Callable[[str, int, int], float]] = {
            "stopped": self._stopped,
            "killed": self._killed,
            "slow": self._slow,
            "lost node": self._lost,
            "storage": self._storage,
        }

    def now(self) -> tuple[int, int]:
        """The newest start that has made a step, and its last one."""
        for number in reversed(starts.numbers(self.run / "starts")):
            progress = starts.read_progress(self.run / "starts", number)
            if progress:
                return number, progress.step
        return 0, 0

    def fault(self, kind: str) -> Fault:
        cluster, (start, step) = self.login.cluster, self.now()
        ranks = {self._rank(pid): (node, pid) for node in cluster.nodes for pid in self.login.tasks(node)}
        assert sorted(ranks) == [0, 1], ranks
        script = cluster.run("squeue", "--noheader", f"--jobs={self.job}", "--format=%B").strip()
        # The loss of the script's own node goes through the queue, test_coming_back has it; and a node that is to blame
        # twice in a row is left out, test_starts has that.
        spared = {"lost node": script, "stopped": self.blamed, "killed": self.blamed}.get(kind)
        rank = self.draw.choice([rank for rank, (node, _) in ranks.items() if node != spared])
        if kind in ("stopped", "killed", "lost node"):
            self.blamed = ranks[rank][0]
        began = time.monotonic()
        noticed = self.does[kind](*ranks[rank], rank) - began
        goes_on = kind in ("slow", "storage")
        self._until(lambda: goes_on or self.now()[0] > start, "the next start")
        number, at = self.now()
        before = at if goes_on else starts_from(self.run, number)
        self._until(lambda: self.now() > (number, before), "a step after it")
        again = time.monotonic() - began
        if kind == "lost node":
            cluster.start_node(ranks[rank][0])
        return Fault(kind, step, noticed, again, 0 if goes_on else max(0, step - before))

    def _stopped(self, node: str, pid: int, rank: int) -> float:
        os.kill(pid, signal.SIGSTOP)
        said = rf"lost {node}: rank {rank} \(cpu\) has not answered for \d+ s: stopped by a signal or a debugger"
        return self._ended(said, stacks=True)

    def _killed(self, node: str, pid: int, rank: int) -> float:
        os.kill(pid, signal.SIGKILL)
        return self._ended(rf"lost {node}: task {rank}: Killed")

    def _lost(self, node: str, pid: int, rank: int) -> float:
        self.login.cluster.kill_node(node)
        return self._ended(rf"lost {node}: ")

    def _slow(self, node: str, pid: int, rank: int) -> float:
        length = len(self.login.log(self.run))
        with slowed(pid):
            words = rf"longseq: warning: {node}: rank {rank} \(cpu\) is [\d.]+ times as slow as the others"
            return self._until(lambda: bool(re.search(words, self.login.log(self.run)[length:])), words)

    def _storage(self, node: str, pid: int, rank: int) -> float:
        """It waits, or trains on; nothing ends by it, and it is said where a rank has to wait."""
        start = self.now()[0]
        with self.disk.stalled():
            time.sleep(STALL_SECONDS)
        assert starts.read_end(self.run / "starts", start) is None, self.login.log(self.run)
        return time.monotonic()

    def _ended(self, words: str, *, stacks: bool = False) -> float:
        """Until the start has ended for a reason; when that was."""
        number = self.now()[0]
        at = self._until(lambda: bool(starts.read_end(self.run / "starts", number)), f"the end of start {number}")
        # The job's script has the last word, which SLURM may know better.
        self._until(lambda: re.match(words, starts.read_end(self.run / "starts", number) or "") is not None, words)
        for each in (0, 1) if stacks else ():
            text = (self.run / f"starts/{number:05d}.stacks-{each}.txt").read_text()
            assert "run_to_its_end" in text, text
        return at

    def _until(self, condition: Callable[[], bool], what: str) -> float:
        deadline = time.monotonic() + 2 * LIMIT
        while not condition():
            ends = [starts.read_end(self.run / "starts", n) for n in starts.numbers(self.run / "starts")]
            assert time.monotonic() < deadline, f"no sign of {what}\n{ends}\n{self.login.log(self.run)[-4000:]}"
            time.sleep(0.05)
        return time.monotonic()

    @staticmethod
    def _rank(pid: int) -> int:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return int(next(each.partition(b"=")[2] for each in variables if each.startswith(b"SLURM_PROCID=")))


def starts_from(run: Path, number: int) -> int:
    """The step of the checkpoint that a start began with."""
    text = starts.path_of(run / "starts", number, "start").read_text()
    found = re.search(r"from step (\d+)$", text.strip())
    return int(found[1]) if found else 0


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """A fifth of the time is left to a process."""
    over = threading.Event()

    def hold() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.05)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kinds(count: int, draw: random.Random) -> list[str]:
    """At least one of each, where there are enough."""
    each = draw.sample(KINDS, len(KINDS))
    return (each + draw.choices(KINDS, k=max(0, count - len(KINDS))))[:count]


def test_random_faults_are_named_and_the_weights_are_those_of_a_quiet_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing() or Disk.missing():
        pytest.skip(missing() or Disk.missing())
    draw = random.Random(SEED)
    plan = kinds(COUNT, draw)
    with Cluster(2 + plan.count("lost node")) as cluster:
        if not cluster.netns:
            pytest.skip("only where nodes have processes of their own")
        with Disk(cluster) as disk:
            found, seconds, kept = _disturbed(cluster, disk, plan, draw, capsys)
            run = disk.folder / "runs/faults"
            last = checkpoints(run)[-1]
            ended = longseq(
                *("fit", "tiny.yaml", "run.name=quiet", "trainer.devices=2", f"trainer.max_steps={last}", *KEYS),
                "trainer.checkpoint_every=0",
                folder=disk.folder,
                timeout=3000,
            )
            assert ended.code == 0, ended.err
            quiet = disk.folder / "runs/quiet"
            weights = [(checkpoint(each, last) / "model.safetensors").read_bytes() for each in (run, quiet)]
            difference = largest_difference(curve(run, "train/loss"), curve(quiet, "train/loss"))
            # The run's own median step has the load of its hour; that of the quiet run has another hour's.
            own, other = (
                TOKENS / statistics.median(curve(each, "train/tokens_per_second").values()) for each in (run, quiet)
            )
    down = sum(fault.again for fault in found)
    soon = sum(fault.again <= LIMIT for fault in found)
    with capsys.disabled():
        print(
            f"{len(found)} faults, seed {SEED}: a step again within {LIMIT:.0f} s after {soon}; {last} steps in "
            f"{seconds:.0f} s, {down:.0f} s of them down; goodput {kept * own / (seconds - down):.1%} by the run's own "
            f"median step ({own:.2f} s), {kept * other / (seconds - down):.1%} by a quiet run's ({other:.2f} s): "
            f"{kept} steps were kept in {seconds - down:.0f} s; "
            f"load {os.getloadavg()[0]:.1f}; weights equal: {weights[0] == weights[1]}"
        )
    assert weights[0] == weights[1]
    assert difference == 0
    late = [fault for fault in found if fault.kind != "storage" and fault.noticed > LIMIT]
    assert not late, late


def _disturbed(
    cluster: Cluster, disk: Disk, plan: list[str], draw: random.Random, capsys: pytest.CaptureFixture[str]
) -> tuple[list[Fault], float, int]:
    """The faults, the seconds from the first step to the last, and the steps that were kept outside faults."""
    (disk.folder / "tiny.yaml").write_text(TINY)
    (disk.folder / "site.yaml").write_text(f"{SITE}hang_seconds: {HANG_SECONDS}\n")
    write_fasta(SyntheticSpec(families=4, records=200, seed=0, mean_length=60), disk.folder / "proteins.fasta")
    login = Login(cluster, disk.folder)
    words = ("--nodes=2", f"--spares={plan.count('lost node')}", "trainer.max_steps=100000", *KEYS)
    job, run = login.submit("faults", *words, "trainer.checkpoint_every=5")
    story, found = Story(login, disk, job, run, draw), []
    login.wait_for_step(run, 1)
    began = time.monotonic()
    kept, reached = 0, story.now()[1]
    for kind in plan:
        step = story.now()[1]
        story._until(lambda step=step: story.now()[1] >= step + BETWEEN, "steps between two")
        found.append(story.fault(kind))
        kept += found[-1].step - reached
        reached = max(found[-1].step, story.now()[1])
        with capsys.disabled():
            print(f"{found[-1]}; load {os.getloadavg()[0]:.1f}", flush=True)
    step = story.now()[1]
    story._until(lambda: story.now()[1] >= step + 8, "eight steps")
    seconds = time.monotonic() - began
    kept += story.now()[1] - reached
    cluster.run("scontrol", "hold", job, check=False)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job, "PENDING"), login.log(run)
    cluster.run("scancel", job)
    restarts = cluster.run("scontrol", "show", "job", job)
    assert "Restarts=1" in restarts, restarts  # by the signal above: none of the faults went through the queue
    assert json.loads(login.type("status", run, "--json"))["step"] == checkpoints(run)[-1]
    return found, seconds, kept
