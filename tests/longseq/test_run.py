"""A run folder: made once, held by one job, given back when nothing was trained; what resuming it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from longseq.cli import main
from longseq.config.loading import load_config
from longseq.errors import RunError
from longseq.runs.run import Run

HOLD = """
import sys
from longseq.runs.run import Run
with Run.open(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(run: Run) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# made and opened


def test_a_new_run_holds_its_configuration_and_nothing_else(run, config):
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.yaml"]
    assert run.config() == config
    assert Run.open("runs/one") == run
    assert not (run.path / "FINISHED").exists()


@pytest.mark.parametrize(
    ("name", "called"),
    [("base", "base"), ("Table S1 (1)-head", "Table-S1-1-head"), ("данные", "run"), ("", "run"), ("x" * 200, "x" * 70)],
)
def test_a_run_without_a_name_is_named_by_its_configuration_and_the_time(config, name, called):
    config.run.name = None
    run = Run.create(config, default_name=name)
    assert re.fullmatch(rf"{called}-\d{{8}}-\d{{6}}", run.path.name)
    assert run.config().run.name == run.path.name


def test_a_second_run_of_a_name_is_refused(run, config):
    with pytest.raises(RunError, match="a run of this name exists"):
        Run.create(config, default_name="unused")


@pytest.mark.parametrize(("path", "sentence"), [("nowhere", "no such run folder"), (".", "not a run folder")])
def test_what_is_no_run_folder_cannot_be_opened(folder, path, sentence):
    with pytest.raises(RunError, match=sentence):
        Run.open(path)


def test_every_start_is_added_to_the_environment(run):
    run.record_start({"step": 0})
    run.record_start({"step": 7})
    assert json.loads((run.path / "environment.json").read_text()) == [{"step": 0}, {"step": 7}]


def test_a_damaged_environment_is_named(run):
    run.record_start({"step": 0})
    with (run.path / "environment.json").open("r+") as file:
        file.truncate(9)
    with pytest.raises(RunError, match=r"environment\.json: not valid JSON, so it was damaged; remove it to go on"):
        run.record_start({"step": 7})


# held


def test_two_processes_cannot_train_one_run(run):
    with held_by_another_process(run) as other:
        with pytest.raises(RunError, match=rf"is being trained already \(process {other.pid}\)"), run.locked():
            pass
        assert (run.path / ".lock").read_text() == f"{other.pid}\n"
    with run.locked():
        pass


def test_a_killed_process_holds_nothing(run):
    with held_by_another_process(run) as other:
        other.kill()
        other.wait()
        with run.locked():
            pass


# given back


def test_an_untrained_run_is_removed(run):
    run.discard_if_untrained()
    assert not run.path.exists()


def test_a_run_that_failed_before_its_first_step_gives_its_name_back(run):
    """The run's keys are written before it."""
    with SummaryWriter(run.tensorboard_dir, purge_step=1) as curves:
        for summary in hparams({"optim.lr": 0.1}, {"valid/loss": 0.0}):
            curves.file_writer.add_summary(summary)
    run.discard_if_untrained()
    assert not run.path.exists()


def test_a_run_with_a_checkpoint_or_a_curve_is_kept(run, publish):
    with SummaryWriter(run.tensorboard_dir) as curves:
        curves.add_scalar("train/loss", 3.0, 1)
    run.discard_if_untrained()
    assert run.path.exists()
    shutil.rmtree(run.tensorboard_dir)
    publish(1)
    run.discard_if_untrained()
    assert run.path.exists()


# its newest whole checkpoint


def test_a_run_without_checkpoints_has_no_newest(run):
    assert run.newest_checkpoint() == (None, [])


def test_damaged_checkpoints_are_passed_over_and_named(run, publish):
    first, second, third, fourth = (publish(step) for step in (9, 10, 11, 12))
    damage(second.weights_path)
    third.manifest_path.unlink()
    fourth.manifest_path.write_text("{}")
    newest, damaged = run.newest_checkpoint()
    assert newest == first
    assert [problem.path for problem in damaged] == [fourth.manifest_path, third.manifest_path, second.weights_path]


# resumed


@pytest.fixture
def resume_refusal(run: Run, publish, capsys: pytest.CaptureFixture[str]):
    """resume_refusal(override, ...): the sentence that refuses it, once the run is found to be as it was."""
    publish(4)

    def resume_refusal(*overrides: str) -> str:
        before = run.config_path.read_text()
        assert main(["resume", str(run.path), *overrides]) == 1
        assert run.config_path.read_text() == before
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("longseq: error: ")
        return last.removeprefix("longseq: error: ")

    return resume_refusal


@pytest.mark.parametrize(
    "override",
    [
        *("run.name=two", "run.dir=elsewhere", "run.seed=1"),
        *("model.preset=small", "model.dim=64", "model.depth=1", "model.heads=4", "model.ffn_dim=9"),
        *("model.objective=masked", "attention.qk_norm=true"),
        *("data.train=other.fasta", "data.valid=other.fasta", "data.test=other.fasta"),
        *("data.valid_fraction=0.1", "data.test_fraction=0.1", "data.length=32", "data.packing=crop"),
        *("data.batch_tokens=128", "data.shuffle_buffer=5"),
    ],
)
def test_what_the_weights_or_the_samples_depend_on_cannot_change(resume_refusal, override, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.fasta").write_text(">a\nMKV\n")
    refused = resume_refusal(override)
    key, _, value = override.partition("=")
    assert refused.startswith(f"{key}=")
    assert value.lower() in refused.lower()
    assert "was started with" in refused
    assert "longseq fit" in refused


def test_another_precision_is_refused_with_what_fits(resume_refusal):
    refused = resume_refusal("trainer.precision=bf16")
    assert "trainer.precision=fp32" in refused
    assert "step-00000004.ckpt" in refused


def test_a_finished_run_says_how_to_train_on(resume_refusal, run):
    run.mark_finished(4)
    refused = resume_refusal("trainer.max_steps=4")
    assert "finished at step 4" in refused
    assert "trainer.max_steps=8" in refused
    assert (run.path / "FINISHED").exists()


def test_a_run_in_training_is_not_resumed_beside_it(resume_refusal, run):
    with held_by_another_process(run):
        assert "is being trained already" in resume_refusal()


def test_missing_data_are_noticed_before_anything_is_started(resume_refusal, folder):
    (folder / "proteins.fasta").unlink()
    assert "proteins.fasta does not exist" in resume_refusal()


@pytest.mark.parametrize("verb", ["resume", "evaluate"])
def test_going_back_behind_a_damaged_checkpoint_is_said(run, publish, capsys, verb):
    publish(4)
    damage(publish(6).weights_path)
    # Both verbs are stopped by something else right after: another precision, a key that is unknown.
    override = {"resume": "trainer.precision=bf16", "evaluate": "model.dmi=1"}[verb]
    assert main([verb, str(run.path), override]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("longseq: warning: ")
    assert "step-00000006.ckpt/model.safetensors" in warning
    assert verb == "evaluate" or "step-00000004.ckpt" in error


def test_a_damaged_checkpoint_that_was_named_is_not_evaluated(publish, capsys):
    saved = publish(4)
    damage(saved.weights_path)
    assert main(["evaluate", str(saved.path)]) == 1
    assert f"{saved.weights_path}: " in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_not_evaluated(run, capsys):
    assert main(["evaluate", str(run.path)]) == 1
    assert "there is no checkpoint yet" in capsys.readouterr().err


def test_a_run_keeps_its_tokenizer_wherever_it_is_moved_to(folder):
    Path("words.json").write_text("{}")
    config = load_config("small.yaml", [f"data.train={folder}/lines.txt", "data.tokenizer=words.json", "run.name=one"])
    run = Run.create(config, default_name="unused")
    Path("words.json").write_text("changed")
    assert Path(run.config().data.tokenizer).read_text() == "{}"
    moved = run.path.rename(folder / "moved")
    assert Run.open(moved).config().data.tokenizer == str(moved / "tokenizer.json")
    assert Run.open(moved).config(("data.tokenizer=words.json",)).data.tokenizer == "words.json"
