"""Starts of a run: numbers that nobody has twice, and an older start that writes nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from longseq.config.schema import Config
from longseq.errors import EXIT_SUPERSEDED, SupersededError
from longseq.runs import checkpoint, starts
from longseq.runs.checkpoint import partial_path, remove_partials
from longseq.runs.run import Run
from longseq.runs.starts import Progress
from longseq.training.callbacks import progress as callbacks
from longseq.training.writer import Writer
from positions import position


def test_starts_that_begin_together_get_different_numbers(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda n: starts.take(tmp_path, f"start {n}"), range(64)))
    assert sorted(taken) == list(range(1, 65)) == starts.numbers(tmp_path)


def test_an_older_start_writes_nothing_more(run):
    old = run.begin("the lost node")
    old.check_start()
    old.mark_finished(7)
    new = run.begin("the job's next start")
    new.check_start()
    for write in (lambda: old.mark_finished(8), lambda: old.record_start({})):
        with pytest.raises(SupersededError, match="start 2 has this run now, so start 1 writes nothing more"):
            write()
    assert (run.path / "FINISHED").read_text() == "7\n"
    assert not (run.path / "environment.json").exists()
    run.check_start()  # one that only looks on is no start at all


def test_a_checkpoint_of_an_older_start_never_gets_its_name(run, publish):
    publish(3)
    old = run.begin("old")
    partial_path(run.checkpoints_dir, 5, old.start).mkdir()
    writer = Writer(old, 0, 2, lambda: pytest.fail("nothing was published"))  # waits for its second rank
    writer.start({"model.safetensors": b"weights"}, position(5))
    writer.finish_part()
    run.begin("new")
    second = Writer(old, 1, 2, lambda: None)
    second.start({"training/shard-1.safetensors": b"moments"}, position(5))
    second.finish()
    writer.finish(timeout=1)
    assert "start 2 has this run now" in str(second.error)
    assert [kept.position.step for kept in run.checkpoints()] == [3]


def test_the_last_moment_before_a_checkpoint_has_its_name_is_a_check(run, publish):
    before = publish(3)
    old = run.begin("old")
    partial_path(run.checkpoints_dir, 5, old.start).mkdir()
    run.begin("new")
    with pytest.raises(SupersededError):
        checkpoint.publish(run.checkpoints_dir, position(5), {}, old.start, old.check_start)
    assert run.checkpoints() == [before]


def test_two_starts_never_write_into_the_same_unfinished_checkpoint(run):
    paths = {partial_path(run.checkpoints_dir, 5, start) for start in (0, 1, 2)}
    assert len(paths) == 3
    for path in paths:
        path.mkdir()
    remove_partials(run.checkpoints_dir)
    assert not any(path.exists() for path in paths)


def test_a_process_that_waits_for_ever_ends_when_a_newer_start_has_the_run(tmp_path):
    number = starts.take(tmp_path, "old")
    program = (
        "import sys, time, pathlib\nfrom longseq.runs import starts\n"
        f"starts.watch(pathlib.Path(sys.argv[1]), {number}, lambda text: print(text, flush=True))\n"
        "print('waiting', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        starts.take(tmp_path, "new")
        assert "start 2 has this run now" in process.stdout.readline()
        assert process.wait(60) == EXIT_SUPERSEDED


def test_one_process_of_a_node_looks_for_newer_starts_and_the_next_when_it_ends(tmp_path):
    number = starts.take(tmp_path, "old")
    program = (
        "import os, sys, time, pathlib\nfrom longseq.runs import starts\nstarts.POLL_SECONDS = 0.1\n"
        "note = lambda event, _: event == 'os.listdir' and os.write(1, b'%d\\n' % os.getpid())\n"
        f"starts.watch(pathlib.Path(sys.argv[1]), {number}, lambda text: None)\n"
        "sys.addaudithook(note)\ntime.sleep(600)\n"
    )
    reading, writing = os.pipe()
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=writing) for _ in range(3)]
    try:
        with os.fdopen(reading) as looked:
            first = {int(looked.readline()) for _ in range(20)}
            assert len(first) == 1
            next(process for process in processes if process.pid in first).kill()
            while (second := int(looked.readline())) in first:
                pass
            assert {int(looked.readline()) for _ in range(20)} == {second}
            starts.take(tmp_path, "new")
            codes = sorted(process.wait(60) for process in processes)
        assert codes == [-signal.SIGKILL, EXIT_SUPERSEDED, EXIT_SUPERSEDED]
    finally:
        os.close(writing)
        for process in processes:
            process.kill()
            process.wait()


def test_progress_is_read_as_it_was_written(tmp_path):
    assert starts.read_progress(tmp_path, 1) is None
    long = Progress(step=123456789, last_step=987654321, loss=2.53125, tokens_per_second=1.5e9, time=1700000000.0)
    for progress in (long, Progress(7, 20, 3.5, 1024.0, 1700000001.0)):
        starts.note_progress(tmp_path, 1, progress)
        assert starts.read_progress(tmp_path, 1) == progress
    starts.path_of(tmp_path, 2, "step").touch()
    assert starts.read_progress(tmp_path, 2) is None


def test_the_first_word_on_how_a_start_ended_counts(tmp_path):
    assert starts.read_end(tmp_path, 1) is None
    starts.note_end(tmp_path, 1, "error the disk\nis full")
    starts.note_end(tmp_path, 1, "error the others went away")
    assert starts.read_end(tmp_path, 1) == "error the disk is full"
    assert os.listdir(tmp_path) == ["00001.end"]  # noqa: PTH208


def test_the_summary_counts_every_step_that_was_trained(run, publish):
    """Stopped at step 27 with a point in the curves every 10."""
    from torch.utils.tensorboard import SummaryWriter

    from longseq.launch.start import results

    publish(27)
    started = run.begin("here")
    with SummaryWriter(run.tensorboard_dir) as curves:
        for step in (10, 20):
            curves.add_scalar("train/tokens_per_second", 100.0, step)
    starts.note_progress(run.starts_dir, started.start, Progress(27, 60, 2.0, 100.0, 0.0))
    assert results(started, 0, 2.0)[0] == "Trained:       27 steps in 2.0 s, 100 tokens/s"
    assert results(started, 26, 2.0)[0] == "Trained:       1 step in 2.0 s"
    assert "Trained" not in results(started, 27, 2.0)[0]


def test_a_step_is_noted_while_the_file_system_stands_still_and_the_last_one_stays(tmp_path, monkeypatch):
    run = Run(tmp_path, 1)
    run.starts_dir.mkdir()
    goes_on, real, written = threading.Event(), starts.note_progress, []

    def stalled(folder: Path, number: int, progress: Progress) -> None:
        goes_on.wait(60)
        written.append(progress.step)
        real(folder, number, progress)

    monkeypatch.setattr(starts, "note_progress", stalled)
    config = Config()
    config.trainer.max_steps = 500
    callback = callbacks.Progress(run, config, SimpleNamespace(shown={"loss": 2.5}))
    trainer = SimpleNamespace(is_global_zero=True, world_size=1, global_step=0, accumulate_grad_batches=1)
    callback.on_train_start(trainer, None)
    for step in range(1, 301):  # the training is not held up
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, step - 1)
    assert starts.read_progress(run.starts_dir, 1) is None
    goes_on.set()
    callback.teardown(trainer, None, "fit")
    found = starts.read_progress(run.starts_dir, 1)
    assert (found.step, found.last_step, found.loss) == (300, 500, 2.5)
    assert len(written) <= 3  # those between were passed over


def test_a_large_job_notes_its_step_less_often_and_its_last_one_at_once(tmp_path, monkeypatch):
    run = Run(tmp_path, 1)
    run.starts_dir.mkdir()
    written: list[int] = []
    monkeypatch.setattr(starts, "note_progress", lambda folder, number, progress: written.append(progress.step))
    callback = callbacks.Progress(run, Config(), SimpleNamespace(shown={}))
    trainer = SimpleNamespace(is_global_zero=True, world_size=4096, global_step=0, accumulate_grad_batches=1)
    callback.on_train_start(trainer, None)
    assert callback.seconds == 10
    for step in range(1, 301):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, step - 1)
    callback.teardown(trainer, None, "fit")  # waits for less than the ten seconds
    assert written[-1] == 300
    assert len(written) <= 3
