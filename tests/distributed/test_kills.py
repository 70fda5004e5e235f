"""Fifty SIGKILLs at random moments: whatever was under way, the run goes on as if it had never been killed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
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


MIXED = 20  # kills of a mixture


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_at_random_a_run_ends_as_one_that_was_never_killed(
    folder: Path, fit: Callable[..., Path], stage: int
) -> None:
    how = (*RESTLESS, f"trainer.zero_stage={stage}")
    unbroken = fit(f"never-killed-{stage}", *how)
    expected = curve(unbroken, "train/loss")

    def check(run: Path, number: int) -> None:
        losses = curve(run, "train/loss")
        assert losses == {step: expected[step] for step in losses}, f"kill {number} of stage {stage}"

    run = killed(folder, f"killed-{stage}", how, [()] * KILLS, check)
    for tag in ("train/loss", "train/accuracy", "train/gradient_norm", "valid/loss", "valid/accuracy"):
        assert curve(run, tag) == curve(unbroken, tag), tag
    assert list(curve(run, "train/loss")) == list(range(1, LAST + 1))
    assert weights_checksum(run, LAST) == weights_checksum(unbroken, LAST)
    assert not list((run / "checkpoints").glob(".*.partial"))


def test_a_mixture_killed_in_changing_worlds_draws_the_samples_of_one_never_killed(
    folder: Path, fit: Callable[..., Path]
) -> None:
    """With weights that never move a step's loss tells its samples: another one in their place moves it by 1e-2."""
    train = "data.train=[{path: proteins.fasta, weight: 2}, {path: others.fasta, weight: 1}]"
    how = (*RESTLESS, train, "optim.lr=0", "model.dropout=0")
    expected = curve(fit("mixture-never-killed", *how), "train/loss")
    worlds = [(f"trainer.devices={(1, 2, 4)[number % 3]}",) for number in range(MIXED)]

    def check(run: Path, number: int) -> None:
        losses = curve(run, "train/loss")
        assert losses == pytest.approx({step: expected[step] for step in losses}, abs=1e-5), f"kill {number}"

    run = killed(folder, "mixture-killed", how, worlds, check)
    check(run, MIXED)
    assert list(curve(run, "train/loss")) == list(range(1, LAST + 1))
    assert set(curve(run, "valid/proteins/loss")) == set(curve(run, "valid/loss"))


def killed(
    folder: Path, name: str, how: Sequence[str], layouts: Sequence[Sequence[str]], check: Callable[[Path, int], None]
) -> Path:
    """A run that was killed once in each layout, at a random moment, and then went on to its end."""
    draw, run = random.Random(f"{SEED} {name}"), folder / "runs" / name
    for number, layout in enumerate(layouts):
        saved = checkpoints(run)[-1] if run.exists() and checkpoints(run) else 0
        if not saved:
            run = folder / "runs" / f"{name}-{number}"
        arguments = ("resume", run) if saved else ("fit", "tiny.yaml", f"run.name={run.name}", *how)
        command = Command(*arguments, *layout, folder=folder, timeout=300)
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
        check(run, number)
    ended = longseq("resume", run, folder=folder, timeout=300)
    assert ended.code == 0, ended.err
    return run
