"""Good checkpoints are never lost: a run does not begin anew next to them, and what cannot be read may be good."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longseq.cli import main
from longseq.errors import RunError
from longseq.launch.slurm.task import _begin
from longseq.runs import checkpoint
from longseq.runs.checkpoint import Checkpoint
from longseq.runs.run import Run


def of_another_version(saved: Checkpoint) -> None:
    text = saved.manifest_path.read_text()
    saved.manifest_path.write_text(text.replace('"format": 2', '"format": 3'))


def cut_manifest(saved: Checkpoint) -> None:
    os.truncate(saved.manifest_path, 100)


def cut_weights(saved: Checkpoint) -> None:
    os.truncate(saved.weights_path, 10)


def flipped(saved: Checkpoint) -> None:
    content = bytearray(saved.weights_path.read_bytes())
    content[7] ^= 1
    saved.weights_path.write_bytes(content)


def io_error(saved: Checkpoint) -> None:
    """A file that opens, and whose first byte the kernel cannot read: EIO."""
    saved.manifest_path.rename(saved.manifest_path.with_name("moved"))
    saved.manifest_path.symlink_to("/proc/self/mem")


def not_reached(saved: Checkpoint) -> None:
    """ELOOP, of the kinds that say nothing of the file."""
    saved.weights_path.rename(saved.weights_path.with_name("moved"))
    saved.weights_path.symlink_to(saved.weights_path)


def of_somebody_else(saved: Checkpoint) -> None:
    shutil.rmtree(saved.path)
    saved.path.write_bytes(b"PK a file of another program")


DAMAGE = {
    "not valid JSON": cut_manifest,
    "bytes instead of": cut_weights,
    "checksum": flipped,
    "missing": of_somebody_else,
}
DOUBT = {"format 3": of_another_version, "Input/output error": io_error, "symbolic links": not_reached}


def content(folder: Path) -> dict[str, str]:
    """Every name below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}"
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def in_a_job(run: Run) -> str:
    return _begin(run.begin("slurm job 1, restart 1, on node1"), run.config())[0]


@pytest.mark.parametrize("reason", [*DAMAGE, *DOUBT])
def test_where_no_checkpoint_can_be_used_nothing_starts_and_nothing_changes(run, publish, capsys, reason):
    for step in (2, 4, 6):
        (DAMAGE | DOUBT)[reason](publish(step))
    before = content(run.checkpoints_dir)
    with pytest.raises(RunError) as refused:
        in_a_job(run)
    for said in (str(refused.value), _resumed(run, capsys)):
        assert "none of its 3 checkpoints can be used" in said
        assert reason in said
        for step in (2, 4, 6):
            assert f"step-0000000{step}.ckpt" in said
    assert content(run.checkpoints_dir) == before
    assert main(["evaluate", str(run.path)]) == 1
    assert "none of its 3 checkpoints can be used" in capsys.readouterr().err


def _resumed(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["resume", str(run.path)]) == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("reason", DOUBT)
def test_what_cannot_be_read_now_is_not_gone_behind(run, publish, capsys, reason):
    publish(2)
    DOUBT[reason](publish(4))
    before = content(run.checkpoints_dir)
    for act in (lambda: in_a_job(run), run.newest_checkpoint):
        with pytest.raises(RunError, match=rf"{reason}.*may be good.*step 2"):
            act()
    assert reason in _resumed(run, capsys)
    assert content(run.checkpoints_dir) == before


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_gone_behind_and_kept(run, publish, capsys, reason):
    good, bad = publish(2), publish(4)
    DAMAGE[reason](bad)
    before = content(bad.path) if bad.path.is_dir() else bad.path.read_bytes()
    assert in_a_job(run) == good.path.name
    assert reason in capsys.readouterr().err
    kept = run.checkpoints_dir / "step-00000004.damaged"
    assert (content(kept) if kept.is_dir() else kept.read_bytes()) == before
    assert (run.checkpoints_dir / "last").resolve() == good.path
    for step in (3, 4, 5):
        publish(step)
        checkpoint.prune(run.checkpoints_dir, keep=1)
    assert [c.step for c in run.checkpoints()] == [5]
    assert kept.exists()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(run):
    run.checkpoints_dir.rmdir()
    run.checkpoints_dir.symlink_to(run.checkpoints_dir)
    with pytest.raises(RunError, match=r"checkpoints: cannot be read \(Too many levels of symbolic links\); its links"):
        in_a_job(run)


@pytest.mark.parametrize("left", ["last", "step-00000004.damaged", "step-4.ckpt", "epoch=1.ckpt"])
def test_a_run_does_not_begin_anew_next_to_what_may_be_left_of_a_checkpoint(run, capsys, left):
    (run.checkpoints_dir / left).symlink_to("gone")
    with pytest.raises(RunError, match="does not begin anew"):
        in_a_job(run)
    assert left in _resumed(run, capsys)


def test_a_checkpoints_folder_that_is_not_mounted_is_not_an_empty_one(run):
    run.checkpoints_dir.rmdir()
    run.checkpoints_dir.symlink_to("/nowhere/checkpoints")
    with pytest.raises(RunError, match="is it mounted"):
        in_a_job(run)


def test_a_run_that_never_had_a_checkpoint_begins(run):
    checkpoint.partial_path(run.checkpoints_dir, 2, 1).mkdir()  # of a start that was killed
    assert in_a_job(run) == ""


def test_nothing_is_removed_while_the_newest_checkpoint_is_not_whole(run, publish):
    publish(1)
    publish(2)
    cut_weights(publish(3))
    checkpoint.prune(run.checkpoints_dir, keep=1)
    assert [c.step for c in run.checkpoints()] == [1, 2, 3]


def test_a_run_whose_checkpoints_cannot_be_read_is_not_discarded(run, publish):
    io_error(publish(1))
    run.discard_if_untrained()
    assert run.path.exists()


def test_steps_of_nine_digits_are_in_order(run):
    """By their number: as text 100000000 comes before 99999999."""
    for step in (99_999_999, 100_000_000):
        (run.checkpoints_dir / checkpoint.checkpoint_name(step)).mkdir()
    assert [c.step for c in run.checkpoints()] == [99_999_999, 100_000_000]


def test_another_precision_is_refused_in_a_job_too(run, publish):
    publish(2)
    config = run.config(("trainer.precision=bf16",))
    with pytest.raises(RunError, match=r"trained with trainer\.precision=fp32"):
        _begin(run.begin("slurm job 1, restart 0, on node1"), config)


def test_a_checkpoint_as_earlier_versions_wrote_it_still_opens(tmp_path):
    """Byte for byte, with the checksums worked out here."""
    path = tmp_path / "step-00000012.ckpt"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    position = {"step": 12, "samples": 48, "world_size": 1, "strategy": "deepspeed", "zero_stage": 2}
    position |= {"precision": "fp32", "accumulate": 1, "valid_loss": None, "unlogged": [0.0, 0.0, 0.0]}
    sums = {"model.safetensors": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    manifest = {"format": 2, "position": position, "files": sums}
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}, indent=1))
    assert Checkpoint(path).problem() is None
    assert Checkpoint(path).position.samples == 48


@pytest.mark.parametrize(
    ("first_line", "verb"), [("slurm job 12, restart 0, on node1", "submit"), ("laptop process 7", "resume")]
)
def test_what_trained_in_a_job_is_gone_on_with_by_a_job(run, first_line: str, verb: str):
    assert run.resume_command == "longseq resume runs/one"
    begun = run.begin(first_line)
    assert begun.resume_command == Run(run.path).resume_command == f"longseq {verb} runs/one"


@pytest.fixture
def other_machine(run: Run) -> Callable[[str], None]:
    """other_machine(job): a start of the run by a process elsewhere, which may still train."""

    def begin(job: str = "null") -> None:
        facts = f'{{"host": "elsewhere", "user": "anna", "pid": 7, "boot": "b", "ticks": 9, "job": {job}}}'
        run.begin(f"elsewhere process 7\n{facts}")

    return begin


def test_a_process_of_another_machine_is_not_overtaken_unasked(run, publish, capsys, other_machine):
    publish(8)  # which is the last step: refused for that, once the run is free
    other_machine()
    said = _resumed(run, capsys)
    assert "process 7 of anna on elsewhere has not said that it ended" in said
    assert "add --take-over" in said
    assert main(["resume", str(run.path), "--take-over"]) == 1
    assert "finished at step 8" in capsys.readouterr().err
    assert main(["status", str(run.path)]) == 0
    assert "UNKNOWN: process 7 of anna on elsewhere cannot be asked" in capsys.readouterr().out
    (run.starts_dir / "00001.end").write_text("saved\n")
    assert "finished at step 8" in _resumed(run, capsys)


def test_a_start_of_an_older_version_says_nothing_and_is_not_waited_for(run, publish, capsys):
    publish(8)
    run.begin("elsewhere process 7")
    assert "finished at step 8" in _resumed(run, capsys)
