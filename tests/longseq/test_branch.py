"""A run that begins at another run's checkpoint: what it keeps, what it may change, and that the other one stays."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from longseq.cli import main
from longseq.errors import RunError
from longseq.launch.start import fit, resume
from longseq.runs.curves import read_curves
from longseq.runs.run import Run

STEPS = ("trainer.max_steps=6", "trainer.checkpoint_every=3", "trainer.log_every=1", "optim.schedule=constant",
         "optim.warmup_steps=1")  # fmt: skip
QUICK = ("trainer.valid_every=0", "trainer.strategy=single", "trainer.probe_every=0")


def files(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def source(folder) -> Run:
    training = fit("small.yaml", [f"data.train=[{folder}/proteins.fasta]", "run.name=source", *STEPS, *QUICK])
    assert training.finished
    return training.run


def losses(run: Run, curve: str = "train/loss") -> dict[int, float]:
    return dict(read_curves(run.tensorboard_dir)[curve])


def test_a_branch_goes_on_as_the_run_itself_would_and_leaves_it_as_it_was(source, folder):
    before = files(source.path)
    branched = resume(source.path, ["run.branch=longer", "trainer.max_steps=9"])
    assert files(source.path) == before
    assert branched.finished
    assert branched.run.path == source.path.with_name("longer")
    assert [c.step for c in branched.run.checkpoints()] == [6, 9]
    config = branched.run.config()
    assert (config.run.name, config.run.branch, config.trainer.max_steps) == ("longer", None, 9)
    origin = json.loads((branched.run.path / "branch.json").read_text())
    assert origin == {"checkpoint": str(source.checkpoints()[-1].path), "step": 6}
    resume(source.path, ["trainer.max_steps=9"])
    assert losses(branched.run) == {step: loss for step, loss in losses(source).items() if step > 6}
    samples = [run.checkpoints()[-1].position.samples for run in (source, branched.run)]
    assert samples[0] == samples[1]


def test_a_decay_is_branched_off_an_older_checkpoint(source):
    """From step 3 on, over the last 3 of 6 steps: 1 − √(1/3), 1 − √(2/3) and 0 of the peak."""
    chosen = source.checkpoints()[0]
    assert chosen.step == 3
    decay = ["optim.schedule=wsd", "optim.decay_fraction=0.5", "optim.final_lr=0"]
    branched = resume(chosen.path, ["run.branch=decayed", *decay])
    rates = losses(branched.run, "train/learning_rate")
    peak = source.config().optim.lr
    expected = {4: 1 - (1 / 3) ** 0.5, 5: 1 - (2 / 3) ** 0.5, 6: 0.0}
    assert {step: rate / peak for step, rate in rates.items()} == pytest.approx(expected, abs=1e-6)
    assert losses(branched.run)[4] == losses(source)[4]  # the same weights and samples, before the first step
    assert losses(branched.run)[6] != losses(source)[6]


def test_a_branch_can_be_stopped_and_resumed_as_any_run(source):
    branch = resume(source.path, ["run.branch=again", "trainer.max_steps=8"]).run
    assert resume(branch.path, ["trainer.max_steps=9"]).finished
    assert sorted(losses(branch)) == [7, 8, 9]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["run.branch=source", "trainer.max_steps=9"], "a run of this name exists"),
        (["run.branch=new", "trainer.max_steps=9", "data.length=32"], "data.length=32"),
        (["run.branch=new", "trainer.max_steps=9", "optim.name=muon"], "optim.name=muon"),
        (["run.branch=new"], "trained for 6 steps, and trainer.max_steps=6: raise it"),
        (["run.branch=a b", "trainer.max_steps=9"], "a run is named with letters"),
    ],
)
def test_what_cannot_be_branched_is_refused_and_leaves_nothing(source, overrides, sentence):
    before = files(source.path)
    with pytest.raises(RunError, match=sentence):
        resume(source.path, overrides)
    assert files(source.path) == before
    assert [path.name for path in source.path.parent.iterdir()] == ["source"]


def test_a_checkpoint_is_no_run_and_a_new_run_is_no_branch(source, folder, capsys):
    with pytest.raises(RunError, match=r"a checkpoint, .* run\.branch=NAME"):
        resume(source.checkpoints()[0].path, ["trainer.max_steps=9"])
    with pytest.raises(RunError, match=r"run\.branch=x goes on from a run's checkpoint"):
        fit("small.yaml", [f"data.train=[{folder}/proteins.fasta]", "run.branch=x"])
    assert main(["resume", str(source.path), "run.branch=new"]) == 1
    assert "raise it" in capsys.readouterr().err


def test_a_run_without_checkpoints_has_nothing_to_branch_off(run):
    with pytest.raises(RunError, match="no checkpoint yet to branch off"):
        resume(run.path, ["run.branch=new"])


def test_a_branch_that_was_not_copied_to_its_end_never_begins_at_step_0(run, publish, monkeypatch):
    """Killed while it was copied: what is left then is no run to go on with; stopped by Ctrl-C it leaves nothing."""
    publish(3)
    new, remove = run.path.with_name("new"), shutil.rmtree
    monkeypatch.setattr(shutil, "copytree", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as of a process that is gone
    with pytest.raises(KeyboardInterrupt):
        resume(run.path, ["run.branch=new", *QUICK])
    left = files(new)
    with pytest.raises(RunError, match="a branch whose first checkpoint was not copied to its end"):
        resume(new)
    assert files(new) == left
    monkeypatch.setattr(shutil, "rmtree", remove)
    remove(new)
    with pytest.raises(KeyboardInterrupt):
        resume(run.path, ["run.branch=new", *QUICK])
    assert not new.exists()


def test_a_branch_says_that_the_newest_checkpoint_is_damaged(run, publish, capsys):
    publish(3)
    newest = publish(6).path
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"step-0*3.ckpt: trained for 3 steps, and trainer.max_steps=3: raise it"):
        resume(run.path, ["run.branch=older", "trainer.max_steps=3", *QUICK])
    said = capsys.readouterr().err
    assert f"longseq: warning: {newest}" in said
    assert "Going back to the one before it." in said
