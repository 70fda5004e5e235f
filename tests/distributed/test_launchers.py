"""A training whose processes torchrun starts, or whatever sets its variables: as one of `longseq fit`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import checkpoint, checkpoints, curve
from longseq.launch.local import free_port

pytestmark = pytest.mark.distributed

RANK = ("-m", "longseq.launch.rank")
WORDS = ("tiny.yaml", "trainer.zero_stage=1", "trainer.checkpoint_every=10")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def process_of(run: Path, rank: int) -> int:
    """The rank that the run's newest start has, by what the kernel says of this machine's processes."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words, told = (proc / "cmdline").read_bytes(), (proc / "environ").read_bytes().split(b"\0")
            name = (proc / "comm").read_text()
        except OSError:
            continue
        mine = f"run.name={run.name}".encode() in words and b"torch.distributed.run" not in words
        if mine and f"RANK={rank}".encode() in told and "guard" not in name:
            return int(proc.name)
    raise AssertionError(f"no rank {rank} of {run}")


def test_torchrun_starts_a_killed_rank_again_and_nothing_shows_of_it(
    folder: Path, two_processes: Callable[[int], Path]
) -> None:
    undisturbed = two_processes(1)
    run = folder / "runs" / "torchrun"
    command = [*TORCHRUN, "--max-restarts=1", *RANK, "fit", *WORDS, f"run.name={run.name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "torchrun.log").open("wb") as log:
        launcher = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    said = Path(log.name)
    while not (run / "starts" / "00001.step").exists():  # which trains by now
        assert launcher.poll() is None, said.read_text()
        time.sleep(0.005)
    rank = process_of(run, 1)
    while not (run / "checkpoints").exists() or not checkpoints(run):
        assert launcher.poll() is None, said.read_text()
        time.sleep(0.001)
    os.kill(rank, signal.SIGKILL)  # of 20 steps after the tenth
    assert launcher.wait(150) == 0, said.read_text()
    assert checkpoints(run) == [10, 20], said.read_text()
    ends = {path.name: path.read_text() for path in (run / "starts").glob("*.end")}
    assert ends["00002.end"].strip() == "finished", ends
    for tag in ("train/loss", "valid/loss", "train/gradient_norm"):
        assert curve(run, tag) == curve(undisturbed, tag), tag
    weights = [(checkpoint(each, 20) / "model.safetensors").read_bytes() for each in (run, undisturbed)]
    assert weights[0] == weights[1]


def test_mpirun_needs_no_more_on_one_machine_and_two_of_it_do_not_meet(
    folder: Path, two_processes: Callable[[int], Path]
) -> None:
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("Open MPI is not installed (Debian: openmpi-bin)")
    options = ["--oversubscribe", "-n", "2", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    names = ("mpirun", "mpirun-beside")
    with (folder / "mpirun.log").open("wb") as log:
        both = [
            subprocess.Popen(
                [mpirun, *options, sys.executable, *RANK, "fit", *WORDS, f"run.name={name}"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
            for name in names
        ]
    assert [each.wait(240) for each in both] == [0, 0], Path(log.name).read_text()
    undisturbed = two_processes(1)
    for name in names:
        run = folder / "runs" / name
        assert curve(run, "train/loss") == curve(undisturbed, "train/loss")
        weights = [(checkpoint(each, 20) / "model.safetensors").read_bytes() for each in (run, undisturbed)]
        assert weights[0] == weights[1]


def test_two_processes_by_their_variables_end_together_and_are_not_started_twice(folder: Path) -> None:
    """As mpirun's with MASTER_ADDR and MASTER_PORT set; a rank that dies takes the other one with it."""
    port = free_port()

    def start(rank: int, name: str, log: str) -> subprocess.Popen[bytes]:
        told = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **told}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["fit", *WORDS, "trainer.max_steps=100000", f"run.name={name}"]
        with (folder / log).open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *RANK, *words], cwd=folder, env=environment, stdout=file, stderr=file
            )

    run = folder / "runs" / "variables"
    ranks = [start(rank, run.name, f"variables-{rank}.log") for rank in range(2)]
    try:
        logs = [folder / f"variables-{rank}.log" for rank in range(2)]
        while not (run / "checkpoints").exists() or not checkpoints(run):
            assert [rank.poll() for rank in ranks] == [None, None], [log.read_text() for log in logs]
            time.sleep(0.05)
        again = start(0, "other", "again.log")
        assert again.wait(60) == 69
        assert f"cannot meet at 127.0.0.1:{port}" in (folder / "again.log").read_text()
        assert not (folder / "runs" / "other").exists()
        ranks[1].kill()
        assert ranks[0].wait(120) == 76  # it has lost the other one
        assert "rank 0 lost its connection to another process" in logs[0].read_text()
        assert (
            json.loads((checkpoint(run, checkpoints(run)[-1]) / "manifest.json").read_text())["position"]["world_size"]
            == 2
        )
    finally:
        for rank in ranks:
            rank.kill()
