"""Stops that a scheduler or a clock asks for: saved at the next step, and an exit code that says "go on"."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from command_line import Command, checkpoints, curve, longseq

pytestmark = pytest.mark.distributed

SLOW = ("data.batch_tokens=4096", "trainer.max_steps=5000", "trainer.devices=2", "trainer.valid_every=0")


@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, pytest.param(signal.SIGUSR2, marks=pytest.mark.long), signal.SIGTERM],
    ids=lambda number: number.name,
)
def test_a_schedulers_signal_saves_at_the_next_step(folder: Path, number: signal.Signals) -> None:
    """However often it comes, and though SIGTERM follows: a scheduler does not mean "at once"."""
    name = f"stopped-by-{number.name}"
    command = Command("fit", "tiny.yaml", f"run.name={name}", *SLOW, folder=folder)
    command.wait_for("step 3/")
    for follow in (number, number, signal.SIGTERM) if number != signal.SIGTERM else (number,):
        command.process.send_signal(follow)
    ended = command.end()
    assert ended.code == 75
    run = folder / "runs" / name
    (step,) = checkpoints(run)
    assert step >= 3
    assert f"Stopped and saved: step {step} of 5000" in ended.out
    assert max(curve(run, "train/loss")) == step


def test_the_time_limit_saves_and_stops_every_start(folder: Path) -> None:
    """It counts from the start of the process: 10 ms are over before the first step, 2 s end at one of 5,000."""
    ended = longseq("fit", "tiny.yaml", "run.name=limited", "trainer.time_limit=0.01s", *SLOW, folder=folder)
    assert ended.code == 75
    assert "trainer.time_limit=0.01s is over" in ended.err
    run = folder / "runs/limited"
    assert checkpoints(run) == [1]
    again = longseq("resume", run, "trainer.time_limit=0:00:02", folder=folder)
    assert again.code == 75
    assert 2 <= checkpoints(run)[-1] < 5000
    losses = curve(run, "train/loss")
    assert list(losses) == list(range(1, checkpoints(run)[-1] + 1))
