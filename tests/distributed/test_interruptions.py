"""A run that is stopped in every way there is, and goes on as if nothing had happened.

One run lives through all of it, a fixture a start, because starts are what costs time here. Dropout, masking, padding
and redraws are on, so a random number in another place would show.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import Command, Ended, alive, checkpoint, checkpoints, curve, longseq, weights_checksum

pytestmark = pytest.mark.distributed

LAST = 60
# 64 sequences a step: steps slow enough to be interrupted between two checkpoints.
RESTLESS = (
    *("trainer.devices=2", "trainer.zero_stage=2", f"trainer.max_steps={LAST}"),
    *("model.objective=masked", "model.dropout=0.1", "data.packing=crop", "data.batch_tokens=4096"),
    *("trainer.checkpoint_every=8", "trainer.valid_every=5"),
)


@dataclass(frozen=True)
class Start:
    """What one start of the run left."""

    ended: Ended
    saved: list[int]  # steps of its checkpoints
    losses: dict[int, float]
    workers: list[int]


@pytest.fixture(scope="module")
def uninterrupted(fit: Callable[..., Path]) -> Path:
    return fit("uninterrupted", *RESTLESS)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "runs" / "restless"


@pytest.fixture(scope="module")
def worker_killed(folder: Path, run: Path) -> Start:
    """kill -9 of one training process after step 11."""
    command = Command("fit", "tiny.yaml", "run.name=restless", *RESTLESS, folder=folder)
    command.wait_for("step 11/")
    workers = command.workers()
    command.kill(workers[1])
    return Start(command.end(), checkpoints(run), curve(run, "train/loss"), workers)


@pytest.fixture(scope="module")
def parent_killed(folder: Path, run: Path, worker_killed: Start) -> Start:
    """Resumed; kill -9 of the longseq command itself after step 19."""
    command = Command("resume", "runs/restless", folder=folder)
    command.wait_for("step 19/")
    workers = command.workers()
    command.kill(command.process.pid)
    return Start(command.end(), checkpoints(run), curve(run, "train/loss"), workers)


@pytest.fixture(scope="module")
def second_resume(folder: Path, run: Path, parent_killed: Start) -> tuple[Ended, Start]:
    """Resumed, and resumed again while it trains; Ctrl-C after step 27."""
    command = Command("resume", "runs/restless", folder=folder)
    command.wait_for("run      ")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    workers = command.workers()
    for pid in workers:  # or it might be at its end before the other is told
        os.kill(pid, signal.SIGSTOP)
    other = longseq("resume", run, folder=elsewhere)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    command.wait_for("step 27/")
    command.interrupt()
    return other, Start(command.end(), checkpoints(run), curve(run, "train/loss"), workers)


@pytest.fixture(scope="module")
def interrupted(second_resume: tuple[Ended, Start]) -> Start:
    return second_resume[1]


@pytest.fixture(scope="module")
def interrupted_twice(folder: Path, run: Path, interrupted: Start) -> Start:
    """Resumed; after step 35 the training processes hang, and a second Ctrl-C follows the first."""
    command = Command("resume", "runs/restless", folder=folder)
    command.wait_for("step 35/")
    workers = command.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    command.interrupt()
    command.wait_for("stopping: saving")
    time.sleep(1.2)  # a second Ctrl-C within one second is the first one's echo
    assert command.process.poll() is None, "the first Ctrl-C waits for the step to end"
    command.interrupt()
    return Start(command.end(), checkpoints(run), curve(run, "train/loss"), workers)


@pytest.fixture(scope="module")
def damaged(folder: Path, run: Path, interrupted_twice: Start) -> tuple[Path, Start]:
    """One byte of the newest checkpoint is flipped; resumed to the end."""
    newest = checkpoint(run, checkpoints(run)[-1])
    file = newest / "training" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ended = longseq("resume", "runs/restless", folder=folder)
    return file, Start(ended, checkpoints(run), curve(run, "train/loss"), [])


@pytest.fixture(scope="module")
def finished(damaged: tuple[Path, Start]) -> Start:
    return damaged[1]


def test_a_killed_process_is_named_and_the_others_end(worker_killed: Start) -> None:
    assert worker_killed.ended.code == 1
    assert "rank 1" in worker_killed.ended.sentence
    assert "SIGKILL" in worker_killed.ended.sentence
    assert "longseq resume" in worker_killed.ended.sentence
    assert worker_killed.ended.seconds < 60
    assert not any(alive(pid) for pid in worker_killed.workers)
    assert worker_killed.saved in ([8], [8, 16])  # it goes on while the kill is on its way


def test_no_process_outlives_a_killed_command(worker_killed: Start, parent_killed: Start) -> None:
    assert parent_killed.ended.code == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in parent_killed.workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in parent_killed.workers)
    assert f"step {worker_killed.saved[-1]} of {LAST}" in parent_killed.ended.err
    assert parent_killed.saved in ([8, 16], [8, 16, 24])


def test_a_run_in_training_is_not_resumed_a_second_time(second_resume: tuple[Ended, Start]) -> None:
    other, _ = second_resume
    assert other.code == 1
    assert "being trained already" in other.sentence


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted: Start) -> None:
    assert interrupted.ended.code == 75
    *regular, stopped_at = interrupted.saved
    assert stopped_at >= 27
    assert regular[-2:] == [(stopped_at - 1) // 8 * 8 - 8, (stopped_at - 1) // 8 * 8]
    assert max(interrupted.losses) == stopped_at
    assert f"Stopped and saved: step {stopped_at} of {LAST}" in interrupted.ended.out
    assert "longseq resume runs/restless" in interrupted.ended.out
    assert "Traceback" not in interrupted.ended.err


def test_a_second_ctrl_c_stops_at_once(interrupted: Start, interrupted_twice: Start) -> None:
    assert interrupted_twice.ended.code == 130
    assert interrupted_twice.ended.seconds < 60  # its processes stand still for ever
    assert not any(alive(pid) for pid in interrupted_twice.workers)
    assert f"step {interrupted.saved[-1]} of {LAST}" in interrupted_twice.ended.err
    assert "Stopped at once" in interrupted_twice.ended.out
    assert "longseq resume runs/restless" in interrupted_twice.ended.out


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    interrupted_twice: Start, damaged: tuple[Path, Start]
) -> None:
    file, start = damaged
    assert start.ended.code == 0, start.ended.err
    assert interrupted_twice.saved[-1] >= 32
    warning = next(line for line in start.ended.err.splitlines() if line.startswith("longseq: warning: "))
    assert str(file) in warning
    assert "checksum" in warning
    assert f"step {interrupted_twice.saved[-2]} of {LAST}" in start.ended.err


@pytest.mark.parametrize("stage", ["worker_killed", "parent_killed", "interrupted", "interrupted_twice", "finished"])
def test_losses_are_bit_identical_to_those_of_a_run_never_stopped(
    uninterrupted: Path, stage: str, request: pytest.FixtureRequest
) -> None:
    losses = request.getfixturevalue(stage).losses
    expected = curve(uninterrupted, "train/loss")
    assert list(losses) == list(range(1, max(losses) + 1))  # no gap and no point twice
    assert losses == {step: expected[step] for step in losses}


def test_a_finished_run_is_that_of_a_run_never_stopped(uninterrupted: Path, run: Path, finished: Start) -> None:
    assert max(finished.losses) == LAST
    for tag in ("valid/loss", "valid/accuracy", "train/gradient_norm", "train/learning_rate"):
        assert curve(run, tag) == curve(uninterrupted, tag), tag
    assert weights_checksum(run, LAST) == weights_checksum(uninterrupted, LAST)
    assert (run / "FINISHED").exists()


def test_a_finished_run_is_not_resumed_but_with_more_steps(folder: Path, run: Path, finished: Start) -> None:
    refused = longseq("resume", "runs/restless", folder=folder)
    assert refused.code == 1
    assert f"finished at step {LAST}" in refused.sentence
    assert "trainer.max_steps=" in refused.sentence
    assert (run / "FINISHED").exists()

    longer = longseq("resume", "runs/restless", f"trainer.max_steps={LAST + 3}", folder=folder)
    assert longer.code == 0, longer.err
    losses = curve(run, "train/loss")
    assert list(losses) == list(range(1, LAST + 4))
    assert losses | finished.losses == losses
    assert checkpoints(run)[-1] == LAST + 3


def test_a_process_killed_before_the_first_step_leaves_nothing_behind(folder: Path) -> None:
    command = Command("fit", "tiny.yaml", "run.name=stillborn", "trainer.devices=2", folder=folder)
    command.wait_for("data.train")
    while len(command.workers()) < 2:
        time.sleep(0.01)
    command.kill(command.workers()[1])
    ended = command.end()
    assert ended.code == 1
    assert ended.sentence.startswith("the process of rank 1 was killed by SIGKILL")
    assert "resume" not in ended.sentence
    assert ended.seconds < 60
    assert not (folder / "runs" / "stillborn").exists()


def test_points_over_several_steps_are_whole_across_a_stop(
    folder: Path, fit: Callable[..., Path], stopped: Callable[..., Path]
) -> None:
    """Stopped between two points of TensorBoard: the next one still covers all of its steps."""
    whole = fit("every-five", "trainer.log_every=5", "trainer.checkpoint_every=7")
    run = stopped(whole, "every-five-stopped", 7)
    assert longseq("resume", run, folder=folder).code == 0
    for tag in ("train/loss", "train/accuracy", "train/gradient_norm", "valid/loss"):
        assert list(curve(run, tag)) == ([10, 20] if tag == "valid/loss" else [5, 10, 15, 20])
        assert curve(run, tag) == pytest.approx(curve(whole, tag), rel=1e-6), tag


def test_a_resumed_run_trains_with_the_rate_it_is_given(
    folder: Path, two_processes: Callable[[int], Path], stopped: Callable[..., Path]
) -> None:
    """Without a rate nothing moves: the restored optimiser's own rate would."""
    run = stopped(two_processes(2), "no-rate", 10)
    still = longseq("resume", run, "optim.lr=0", "trainer.max_steps=12", folder=folder)
    assert still.code == 0, still.err
    assert weights_checksum(run, 12) == weights_checksum(run, 10)
    assert list(curve(run, "train/learning_rate").values())[9:] == pytest.approx([3e-3, 0, 0])
