"""Checkpoints written in the background: named when all ranks' files are there, or not at all."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from safetensors.torch import load_file

from longseq.config.schema import Config
from longseq.errors import EXIT_CRASHED, EXIT_ERROR
from longseq.runs.checkpoint import partial_path, remove_partials
from longseq.runs.run import Run
from longseq.training.callbacks import checkpointing
from longseq.training.callbacks.gradients import GradientNorm
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.collectives import ControlGroup
from longseq.training.kept_output import keep_output
from longseq.training.worker import outcome
from longseq.training.writer import Writer
from positions import position


def writers(run: Run, ranks: int, published: list[int] | None = None) -> list[Writer]:
    note = (lambda: published.append(1)) if published is not None else (lambda: None)
    return [Writer(run, rank, ranks, note) for rank in range(ranks)]


def begin(run: Run, step: int) -> None:
    partial_path(run.checkpoints_dir, step).mkdir(parents=True)


def test_a_checkpoint_has_its_name_when_the_last_rank_has_written(run):
    published: list[int] = []
    zero, one, two = writers(run, 3, published)
    begin(run, 5)
    zero.start({"model.safetensors": {"w": torch.ones(3)}, "training/loops.pt": b"x"}, position(5))
    one.start({"training/rank-00001.safetensors": {"v": torch.zeros(2)}}, position(5))
    zero.finish_part()
    one.finish()
    assert run.checkpoints() == []
    two.start({}, position(5))  # has nothing of its own to write
    two.finish()
    zero.finish()
    newest, damaged = run.newest_checkpoint()
    assert damaged == []
    assert newest.position.step == 5
    assert load_file(newest.weights_path)["w"].tolist() == [1, 1, 1]
    files = sorted(path.relative_to(newest.path).as_posix() for path in newest.path.rglob("*") if path.is_file())
    assert files == ["manifest.json", "model.safetensors", "training/loops.pt", "training/rank-00001.safetensors"]
    assert published == [1]


@pytest.fixture
def saving(run: Run) -> checkpointing.Checkpointing:
    """The callback of a training with one process, about to write the checkpoint of step 5."""
    found = checkpointing.Checkpointing(run, Config(), StopFlag(), GradientNorm(Config()), PassThroughProfiler())
    found.control, found.writer = ControlGroup(), Writer(run, 0, 1, lambda: None)
    begin(run, 5)
    return found


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.EROFS, "Read-only file system; this file system is mounted read-only; choose a folder", EXIT_ERROR),
        (errno.ENOSPC, "No space left on device; make room, or choose another disk", EXIT_ERROR),
        (errno.ESTALE, "Stale file handle; the server of this network file system has replaced", EXIT_CRASHED),
        (errno.EIO, "Input/output error; the disk or its server fails", EXIT_CRASHED),
    ],
)
@pytest.mark.parametrize("where", ["write", "publish"])
def test_a_file_system_that_fails_leaves_the_last_checkpoint_and_a_sentence(
    run, saving, publish, monkeypatch, number, words, code, where
):
    """What may pass crashes: a job then starts again, from that checkpoint."""
    publish(3)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"longseq.training.writer.{where}", fail)
    saving.writer.start({"model.safetensors": b"weights"}, position(5))
    ended, sentence = outcome(saving.finish_writing, run)
    assert ended == code
    assert sentence.startswith(f"{run.checkpoints_dir}: the checkpoint of step 5 could not be written: {words}")
    assert "that of step 3 is complete. Then go on with `longseq resume " in sentence
    assert [kept.position.step for kept in run.checkpoints()] == [3]
    assert outcome(fail, run)[0] == code


def test_a_rank_that_cannot_list_the_starts_leaves_no_other_waiting(run, saving, monkeypatch):
    """It votes, as all do, before it looks whether a newer start has the run; and it says what they say."""
    asked = []

    def fail(*_: object) -> None:
        asked.append("starts")
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("longseq.training.writer.write", fail)
    monkeypatch.setattr(Run, "check_start", fail)
    monkeypatch.setattr(saving.control, "any", lambda *flags: asked.append("all") or list(flags))
    saving.writer.start({"model.safetensors": b"weights"}, position(5))
    ended, sentence = outcome(saving.finish_writing, run)
    assert (ended, "the checkpoint of step 5 could not be written" in sentence) == (EXIT_CRASHED, True)
    assert asked[-3:] == ["all", "all", "starts"]


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_a_long_wait_for_the_file_system_is_said(run, saving, monkeypatch, capfd, seconds):
    monkeypatch.setattr(checkpointing, "_LONG_SECONDS", 0.5)
    saving.writer.start({"model.safetensors": b"weights"}, position(5), lambda: time.sleep(seconds))
    saving.finish_writing()
    assert [kept.position.step for kept in run.checkpoints()] == [5]
    said = capfd.readouterr().err.splitlines()
    if not seconds:
        assert said == []
        return
    warning, waited = said
    assert warning == (
        f"longseq: warning: {run.checkpoints_dir}: the checkpoint of step 5 is being written for 0.5 s, and the "
        "training waits: is the file system there?"
    )
    assert re.fullmatch(r"longseq: the training has waited \d+ s for the file system\.", waited)


def test_what_one_rank_cannot_write_is_never_published(run):
    zero, one = writers(run, 2)
    begin(run, 5)
    (partial_path(run.checkpoints_dir, 5) / "training").write_text("a file in the folder's place")
    zero.start({"model.safetensors": b"weights"}, position(5))
    one.start({"training/rank-00001.safetensors": b"shard"}, position(5))
    one.finish_part()
    assert one.failed
    assert "exists" in one.reason.lower() or "directory" in one.reason.lower()
    zero.give_up()
    zero.finish()
    assert not zero.failed
    assert run.checkpoints() == []


def test_a_rank_that_never_comes_is_not_waited_for_at_the_end(run):
    threads = threading.active_count()  # those that other tests have left, too
    zero, _ = writers(run, 2)
    begin(run, 5)
    zero.start({"model.safetensors": b"weights"}, position(5))
    zero.finish(timeout=0.2)
    assert run.checkpoints() == []
    assert threading.active_count() <= threads


KILLED = """
import sys, torch
from longseq.runs.checkpoint import partial_path
from longseq.runs.run import Run
from longseq.training.worker import outcome
from longseq.training.writer import Writer
from positions import position
run = Run.open(sys.argv[1])
partial_path(run.checkpoints_dir, 8).mkdir()
writer = Writer(run, 0, 1, lambda: None)
writer.start({"model.safetensors": {"w": torch.ones(1 << 26)}}, position(8))
print("writing", flush=True)
writer.finish()
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_one_before(run, publish):
    before = publish(7)
    tests = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(run.path)], stdout=subprocess.PIPE, text=True, cwd=tests
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert partial_path(run.checkpoints_dir, 8).exists()
    assert run.newest_checkpoint() == (before, [])
    remove_partials(run.checkpoints_dir)
    assert run.newest_checkpoint() == (before, [])


def test_one_checkpoint_is_written_at_a_time(run):
    (writer,) = writers(run, 1)
    for step in (1, 2):
        begin(run, step)
    writer.start({"model.safetensors": b"weights"}, position(1))
    with pytest.raises(AssertionError, match="not finished"):
        writer.start({"model.safetensors": b"weights"}, position(2))
    writer.finish()
    writer.start({"model.safetensors": b"weights"}, position(2))
    writer.finish()
    assert [checkpoint.position.step for checkpoint in run.checkpoints()] == [1, 2]


def test_any_failure_is_told_and_not_waited_for(run):
    """An unknown dtype, say: no error of the disk."""
    (writer,) = writers(run, 1)
    begin(run, 1)
    writer.start({"model.safetensors": {"w": torch.ones(2, dtype=torch.complex64)}}, position(1))
    writer.finish()
    assert writer.failed
    assert writer.reason.startswith("KeyError")
    assert run.checkpoints() == []


def test_output_that_cannot_be_kept_is_said(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file where the folder should be")
    stdout = sys.stdout
    log = tmp_path / "logs" / "rank-0.log"
    keep_output(log)
    assert sys.stdout is stdout
    said = capsys.readouterr().err
    assert said.startswith(f"longseq: warning: {log}: cannot be written, so `longseq logs` will not show ")
    assert "(File exists)" in said
