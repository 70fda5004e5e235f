"""Ranks that hang in a training on this machine: named, with everybody's stacks, and nothing is lost by it.

One run lives through all of it, a fixture a start, because starts are what costs time here.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import Command, Ended, curve, longseq, weights_checksum
from longseq.launch import processes

pytestmark = pytest.mark.distributed

LAST = 60
SLOW = (
    *("trainer.devices=2", "trainer.zero_stage=2", f"trainer.max_steps={LAST}", "trainer.checkpoint_every=8"),
    *("model.objective=masked", "model.dropout=0.1", "data.packing=crop", "data.batch_tokens=4096"),
    "data.workers=1",
)
NOTICED = "trainer.hang_seconds=8"  # far more than a step takes here, on a busy machine too
# What a rank with a bug does: it waits, and its other threads go on. Imported by every Python process that starts.
STUCK = """
import os, time
if os.environ.get("RANK") == "1":
    from longseq.training.callbacks import gradients
    real = gradients.GradientNorm.on_before_optimizer_step
    def on_before_optimizer_step(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == 30:
            a_bug_that_waits()
    def a_bug_that_waits():
        time.sleep(1000)
    gradients.GradientNorm.on_before_optimizer_step = on_before_optimizer_step
"""


@dataclass(frozen=True)
class Start:
    """How a start of the run ended, and what it kept."""

    ended: Ended
    stacks: dict[int, str]  # by rank
    hung: int  # the process that was stopped


@pytest.fixture(scope="module")
def undisturbed(fit: Callable[..., Path]) -> Path:
    return fit("undisturbed", *SLOW)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "runs" / "hangs"


@pytest.fixture(scope="module")
def rank_stopped(folder: Path, run: Path) -> Start:
    command = Command("fit", "tiny.yaml", "run.name=hangs", NOTICED, *SLOW, folder=folder, timeout=300)
    command.wait_for("step 11/")
    pid = command.workers()[1]
    os.kill(pid, signal.SIGSTOP)
    return Start(command.end(), kept(run, 1), pid)


@pytest.fixture(scope="module")
def data_worker_stopped(folder: Path, run: Path, rank_stopped: Start) -> Start:
    command = Command("resume", run, folder=folder, timeout=300)
    command.wait_for("step 19/")
    rank = command.workers()[0]
    pid = next(child for child in processes.descendants(rank) if _python(child))
    os.kill(pid, signal.SIGSTOP)
    return Start(command.end(), kept(run, 2), pid)


@pytest.fixture(scope="module")
def rank_stuck(folder: Path, run: Path, data_worker_stopped: Start) -> Start:
    (folder / "bug").mkdir()
    (folder / "bug" / "sitecustomize.py").write_text(STUCK)
    path = os.pathsep.join(filter(None, (str(folder / "bug"), os.environ.get("PYTHONPATH"))))
    command = Command("resume", run, folder=folder, timeout=300, environment={"PYTHONPATH": path})
    command.wait_for("step 30/")
    return Start(command.end(), kept(run, 3), 0)


@pytest.fixture(scope="module")
def gone_on(folder: Path, run: Path, rank_stuck: Start) -> Ended:
    return longseq("resume", run, folder=folder, timeout=300)


def test_a_rank_that_is_stopped_is_named_and_every_rank_says_what_it_does(rank_stopped: Start, run: Path) -> None:
    assert rank_stopped.ended.code == 1
    said = rank_stopped.ended.sentence
    assert re.match(r"\S+: rank 1 \(cpu\) has not answered for \d+ s: stopped by a signal or a debugger ", said), said
    assert f"(trainer.hang_seconds). What each rank was doing: {run / 'starts'}/00001.stacks-*.txt." in said
    assert "torchfrtrace --prefix 00001.collectives- " in said
    assert said.endswith("Go on with `longseq resume runs/hangs`.")
    assert rank_stopped.stacks.keys() == {0, 1}
    for rank, stacks in rank_stopped.stacks.items():
        assert f"rank {rank}, " in stacks
        assert re.search(r'File ".*/training/fit.py", line \d+ in run_to_its_end', stacks)
    assert f"thread {rank_stopped.hung} python: state T" in rank_stopped.stacks[1]
    assert (run / "starts/00001.collectives-0").stat().st_size > 0
    assert not Path(f"/proc/{rank_stopped.hung}").exists()


def test_a_data_worker_that_is_stopped_is_named(data_worker_stopped: Start) -> None:
    said = data_worker_stopped.ended.sentence
    pid = data_worker_stopped.hung
    assert re.match(
        rf"\S+: rank 0 \(cpu\) has kept the others waiting for \d+ s, waiting for its data worker \(process {pid}\), "
        r"which is stopped \(trainer\.hang_seconds\)\.",
        said,
    ), said
    assert f"--- process {pid} (a data worker, perhaps)" in data_worker_stopped.stacks[0]
    assert re.search(r'File ".*/longseq_data/samples/background.py", line \d+ in work', data_worker_stopped.stacks[0])


def test_a_rank_that_waits_for_ever_is_named_with_the_line_where_it_waits(rank_stuck: Start) -> None:
    said = rank_stuck.ended.sentence
    assert re.match(
        r"\S+: rank 1 \(cpu\) has kept the others waiting for \d+ s, at \[Callback\]GradientNorm\.", said
    ), said
    assert re.search(r"sitecustomize.py\", line \d+ in a_bug_that_waits", rank_stuck.stacks[1])
    assert "a_bug_that_waits" not in rank_stuck.stacks[0]


def test_the_run_ends_as_one_that_was_never_disturbed(gone_on: Ended, run: Path, undisturbed: Path) -> None:
    assert gone_on.code == 0, gone_on.err
    for tag in ("train/loss", "train/gradient_norm", "valid/loss"):
        assert curve(run, tag) == curve(undisturbed, tag), tag
    assert weights_checksum(run, LAST) == weights_checksum(undisturbed, LAST)


def test_one_process_that_is_stopped_is_noticed(folder: Path) -> None:
    """While it has a checkpoint to write, too; Ctrl-C cannot save, so the watchdog has the last word."""
    one = ("trainer.devices=1", "trainer.checkpoint_every=1", "trainer.max_steps=100000", NOTICED)
    command = Command("fit", "tiny.yaml", "run.name=alone", *one, folder=folder, timeout=300)
    command.wait_for("step 3/")
    os.kill(command.workers()[0], signal.SIGSTOP)
    command.interrupt()
    ended = command.end()
    assert ended.code == 1
    assert re.match(r"\S+: rank 0 \(cpu\) has not answered for \d+ s: stopped", ended.sentence), ended.sentence
    assert kept(folder / "runs" / "alone", 1).keys() == {0}


def test_stacks_are_written_on_request_and_the_training_goes_on(folder: Path, tmp_path: Path) -> None:
    long = ("trainer.devices=1", "trainer.max_steps=100000")
    command = Command("fit", "tiny.yaml", "run.name=asked", *long, folder=folder, timeout=300)
    command.wait_for("step 3/")
    os.kill(command.workers()[0], signal.SIGQUIT)
    stacks = folder / "runs" / "asked" / "starts" / "00001.stacks-0.txt"
    deadline = time.monotonic() + 60
    while not (stacks.exists() and "run_to_its_end" in stacks.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.interrupt()
    assert command.end().code == 75


def kept(run: Path, start: int) -> dict[int, str]:
    files = (run / "starts").glob(f"{start:05d}.stacks-*.txt")
    return {int(file.name.partition("stacks-")[2].removesuffix(".txt")): file.read_text() for file in files}


def _python(pid: int) -> bool:
    return b"longseq_data.samples" in Path(f"/proc/{pid}/cmdline").read_bytes()
