"""Thirty SIGKILLs at random moments: whatever was under way, the run goes on as if it had never been killed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Command, alive, checkpoints, curve, longseq, weights_checksum

pytestmark = [pytest.mark.distributed, pytest.mark.long]

LAST = 180
KILLS = int(os.environ.get("LONGSEQ_KILLS", "15"))  # of each stage
SEED = os.environ.get("LONGSEQ_KILLS_SEED", "0")  # another one: other moments
# Between two steps there is often a checkpoint to write or a validation, so that many kills hit one.
RESTLESS = (
    *("trainer.devices=2", f"trainer.max_steps={LAST}", "trainer.checkpoint_every=3", "trainer.valid_every=4"),
    *("model.objective=masked", "model.dropout=0.1", "data.packing=crop", "data.batch_tokens=2048"),
)


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_at_random_a_run_ends_as_one_that_was_never_killed(
    folder: Path, fit: Callable[..., Path], stage: int
) -> None:
    how = (*RESTLESS, f"trainer.zero_stage={stage}")
    unbroken = fit(f"never-killed-{stage}", *how)
    expected = curve(unbroken, "train/loss")
    draw, run = random.Random(f"{SEED} {stage}"), folder / "runs" / f"killed-{stage}"
    for number in range(KILLS):
        saved = checkpoints(run)[-1] if run.exists() and checkpoints(run) else 0
        arguments = ("resume", run) if saved else ("fit", "tiny.yaml", f"run.name=killed-{stage}-{number}", *how)
        if not saved:
            run = folder / "runs" / f"killed-{stage}-{number}"
        command = Command(*arguments, folder=folder, timeout=300)
        command.wait_for(f"step {saved + draw.randint(4, 11)}/")
        time.sleep(draw.random() * 0.4)
        workers = command.workers()
        command.kill(draw.choice([command.process.pid, *workers]))
        ended = command.end()
        assert ended.code != 0
        assert ended.seconds < 60
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "a process outlived the kill"
            time.sleep(0.05)
        losses = curve(run, "train/loss")
        assert losses == {step: expected[step] for step in losses}, f"kill {number} of stage {stage}"
    ended = longseq("resume", run, folder=folder, timeout=300)
    assert ended.code == 0, ended.err
    for tag in ("train/loss", "train/accuracy", "train/gradient_norm", "valid/loss", "valid/accuracy"):
        assert curve(run, tag) == curve(unbroken, tag), tag
    assert list(curve(run, "train/loss")) == list(range(1, LAST + 1))
    assert weights_checksum(run, LAST) == weights_checksum(unbroken, LAST)
    assert not list((run / "checkpoints").glob(".*.partial"))
