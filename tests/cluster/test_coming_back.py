"""Jobs that are interrupted in every way, on a real SLURM cluster: the run comes back, nothing is lost or doubled."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import alive, checkpoints, curve, largest_difference
from longseq.runs import starts

from .conftest import ENDED, Login

pytestmark = pytest.mark.distributed

LONG = ("data.batch_tokens=12288", "trainer.max_steps=80", "trainer.valid_every=40", "trainer.zero_stage=2")


@pytest.fixture(scope="module")
def uninterrupted(here: Callable[..., Path]) -> Path:
    return here("uninterrupted", "trainer.devices=2", *LONG)


def whole(run: Path, uninterrupted: Path, within: float = 0.0) -> None:
    """The run is one unbroken run, as if nothing had happened."""
    assert (run / "FINISHED").exists()
    for tag in ("train/loss", "valid/loss", "train/learning_rate"):
        assert largest_difference(curve(run, tag), curve(uninterrupted, tag)) <= within
    assert checkpoints(run) == checkpoints(uninterrupted)
    assert not list((run / "checkpoints").glob(".*partial"))
    if not within:
        weights = [each / "checkpoints/last/model.safetensors" for each in (run, uninterrupted)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def back_inside_the_job(login: Login, job: str, run: Path, why: str) -> None:
    """SLURM has seen one job that was never in its queue again, whose first start ended so."""
    assert login.cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    assert "Restarts=0" in login.cluster.run("scontrol", "show", "job", job)
    assert starts.numbers(run / "starts") == [1, 2]
    assert (starts.read_end(run / "starts", 1) or "").startswith(why)


def test_a_run_comes_back_from_signal_requeue_a_killed_rank_and_a_new_controller(
    login: Login, uninterrupted: Path
) -> None:
    cluster = login.cluster
    job, run = login.submit("story", "--nodes=2", *LONG)

    login.wait_for_step(run, 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as ahead of a time limit
    second = login.wait_for_step(run, 12, start=2)
    assert starts.read_end(run / "starts", 1) == "saved"
    assert second.step >= 12

    cluster.run("scontrol", "requeue", job)  # as an administrator does
    login.wait_for_step(run, 25, start=3)

    cluster.restart_controller()
    login.kill_task("node2")
    login.wait_for_step(run, 45, start=4)

    assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    whole(run, uninterrupted)
    log = login.log(run)
    assert "restart 2, on node" in log
    assert "restart 3" not in log  # the killed rank came back without the queue
    ends = [starts.read_end(run / "starts", number) for number in (1, 3, 4)]
    assert ends == ["saved", "lost node2: task 1: Killed", "finished"]
    assert (run / "starts/00003.crash").exists()


def test_a_spare_takes_the_place_of_a_node_whose_power_fails(login: Login, uninterrupted: Path) -> None:
    cluster = login.cluster
    copies = ["trainer.memory_checkpoint_every=1"] if cluster.netns else []  # which need a /dev/shm for each node
    job, run = login.submit("spare", "--nodes=2", "--spares=1", *copies, *LONG)
    login.wait_for_step(run, 14)
    cluster.kill_node("node2")
    try:
        back_inside_the_job(login, job, run, "lost node2: SLURM")
    finally:
        cluster.start_node("node2")
    assert "without node2 in this job from now on" in login.log(run)
    assert "2 processes on node1, node3" in login.log(run)
    if copies:
        found = re.search(r"going on from step (\d+), which start 1 has left in the memory of node1\.", login.log(run))
        assert found, login.log(run)
        assert int(found[1]) > 10  # no checkpoint's step: those are every tenth
        assert int(found[1]) % 10
        for node in ("node1", "node3"):
            cluster.tell(node, f"ls /dev/shm > {cluster.folder}/left-{node} && touch {cluster.folder}/listed-{node}")
            _until((cluster.folder / f"listed-{node}").exists, 20, "a listing", "")
            assert "longseq-" not in (cluster.folder / f"left-{node}").read_text()
    whole(run, uninterrupted)
    cluster.wait_until_idle()


def test_a_spare_takes_the_place_of_an_unfit_node(login: Login, uninterrupted: Path) -> None:
    """The one of the job's script, so that rank 0 is on another: its temporary folder has no room."""
    cluster = login.cluster
    if not cluster.netns:
        pytest.skip("nodes share their files without namespaces")
    small = cluster.folder / "small"
    small.mkdir()
    cluster.tell("node1", f"mount -t tmpfs -o size=1m tmpfs {small} && touch {cluster.folder}/is-small")
    _until((cluster.folder / "is-small").exists, 20, "a small file system", "")
    site = (login.folder / "site.yaml").read_text().replace("'1'}", f"'1', TMPDIR: {small}}}")
    (login.folder / "small.yaml").write_text(site)
    job, run = login.submit("one-unfit", "--nodes=2", "--spares=1", "--site=small.yaml", *LONG)
    try:
        back_inside_the_job(
            login, job, run, f"preflight node1: only 1.0 MiB free in {small} (preflight_disk_gib=0.01)."
        )
    finally:
        cluster.tell("node1", f"umount {small}")
    assert "2 processes on node2, node3" in login.log(run)
    whole(run, uninterrupted)


def test_the_power_of_a_node_fails_and_the_others_go_on(login: Login, uninterrupted: Path) -> None:
    """The node of the job's script, with a rank on it; the run goes on elastically: two nodes of three are left."""
    cluster = login.cluster
    job, run = login.submit("power", "--nodes=3", "--min-nodes=2", *LONG)
    login.wait_for_step(run, 12)
    kept = checkpoints(run)[-1]
    cluster.kill_node("node1")
    try:
        login.wait_for_step(run, kept + 1, start=2)
        assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    finally:
        cluster.start_node("node1")
    whole(run, uninterrupted, within=1e-4)
    numbers = starts.numbers(run / "starts")
    assert "2 processes on node2, node3" in login.log(run)
    assert starts.read_progress(run / "starts", numbers[-1]).step == 80
    cluster.wait_until_idle()


def test_two_writers_leave_one_unbroken_run(login: Login, uninterrupted: Path) -> None:
    """slurmd dies and its tasks live on; the job starts again on another node, and then the old tasks wake up."""
    cluster = login.cluster
    job, run = login.submit("two-writers", "--nodes=1", "--tasks-per-node=2", *LONG)
    login.wait_for_step(run, 12)
    node = next(node for node in cluster.nodes if login.tasks(node))
    old = login.tasks(node)
    assert len(old) == 2
    cluster.kill_slurmd(node)
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    try:
        login.wait_for_step(run, 22, start=2)
        before = starts.read_progress(run / "starts", 1)
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        _until(lambda: not any(map(alive, old)), 30, "the end of the old tasks", login.log(run))
        assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    finally:
        cluster.start_node(node)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    after = starts.read_progress(run / "starts", 1)
    assert before is not None
    assert after is not None
    assert after.step <= before.step + 3  # it noticed at once
    # Its srun is gone, which took rank 0's words to the job's log.
    words = "start 2 has this run now, so start 1 writes nothing more to it and ends."
    assert words in (run / "logs/rank-1.log").read_text()
    assert (run / "FINISHED").read_text() == "80\n"
    whole(run, uninterrupted)
    cluster.wait_until_idle()


def _until(condition: Callable[[], bool], seconds: float, what: str, log: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}\n{log}"
        time.sleep(0.1)
