"""A checkpoint folder: written whole or not at all, and any later damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from longseq.errors import RunError
from longseq.runs import checkpoint
from longseq.runs.checkpoint import Checkpoint


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_published_checkpoint_has_its_name_and_knows_its_position(run, publish):
    saved = publish(12)
    assert names(run.checkpoints_dir) == ["last", "step-00000012.ckpt"]
    assert saved.path == run.checkpoints_dir / "step-00000012.ckpt"
    assert saved.problem() is None
    expected = {"step": 12, "samples": 48, "world_size": 1, "zero_stage": 2, "precision": "fp32", "accumulate": 1}
    rest = {"strategy": "deepspeed", "valid_loss": None, "unlogged": [0.0, 0.0, 0.0]}
    assert asdict(Checkpoint(saved.path).position) == expected | rest


def test_last_names_the_newest_checkpoint_and_still_does_when_the_run_is_moved(run, publish):
    publish(1)
    newest = publish(2)
    assert (run.checkpoints_dir / "last").resolve() == newest.path
    run.path.rename(run.path.with_name("moved"))
    assert Checkpoint(run.path.with_name("moved") / "checkpoints" / "last").position.step == 2


def test_a_checkpoint_in_the_making_is_none(run, publish):
    publish(1)
    partial = checkpoint.partial_path(run.checkpoints_dir, 2)
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert [c.position.step for c in run.checkpoints()] == [1]


def test_a_damaged_checkpoint_is_replaced_by_the_same_step_written_again(publish):
    flip(publish(3).weights_path, 5)
    assert publish(3).problem() is None


def test_pruning_keeps_the_newest_and_removes_what_was_interrupted(run, publish):
    for step in (9, 10, 100, 101):
        publish(step)
    checkpoint.partial_path(run.checkpoints_dir, 102).mkdir()
    checkpoint.prune(run.checkpoints_dir, keep=2)
    assert names(run.checkpoints_dir) == ["last", "step-00000100.ckpt", "step-00000101.ckpt"]


def test_checkpoints_that_cannot_be_removed_are_said_and_spare_the_others_nothing(run, publish, capsys, monkeypatch):
    for step in range(1, 7):
        publish(step)
    rename = Path.rename

    def refused(path, target):
        if path.name in ("step-00000002.ckpt", "step-00000004.ckpt"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    checkpoint.prune(run.checkpoints_dir, keep=1)
    assert names(run.checkpoints_dir) == ["last", *(f"step-0000000{step}.ckpt" for step in (2, 4, 6))]
    said = capsys.readouterr().err
    assert said.startswith(f"longseq: warning: {run.checkpoints_dir / 'step-00000002.ckpt'}: is no longer needed, but ")
    assert "(1 more like it)" in said
    monkeypatch.undo()
    (run.checkpoints_dir / ".step-00000004.ckpt.removed.partial" / "training").mkdir(parents=True)  # of a kill
    checkpoint.prune(run.checkpoints_dir, keep=1)
    assert names(run.checkpoints_dir) == ["last", "step-00000006.ckpt"]
    assert capsys.readouterr().err == ""


def test_a_removal_that_fails_in_the_middle_is_said(run, publish, capsys, monkeypatch):
    for step in (9, 10):
        publish(step)
    unlink = os.unlink

    def refused(path, **options):
        if str(path).endswith("manifest.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refused)
    checkpoint.prune(run.checkpoints_dir, keep=1)
    assert "step-00000009.ckpt: is no longer needed, but cannot be removed" in capsys.readouterr().err
    assert run.newest_checkpoint()[0].step == 10


def test_pruning_prefers_the_checkpoint_just_written_to_damaged_ones_after_it(run, publish):
    """A resume goes back behind a damaged checkpoint, and writes its own before it reaches that step again."""
    publish(100)
    flip(publish(200).weights_path, 5)
    saved = publish(150)
    checkpoint.prune(run.checkpoints_dir, keep=1)
    newest, damaged = run.newest_checkpoint()
    assert newest == saved
    assert len(damaged) == 1
    assert not (run.checkpoints_dir / "step-00000100.ckpt").exists()


def test_the_best_and_every_nth_are_kept_beside_the_newest(run, publish):
    """Of equal losses the older counts; a step without a validation is never the best."""
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 1.0), (6, 4.0), (7, 5.0), (8, 6.0)):
        publish(step, loss)
    checkpoint.prune(run.checkpoints_dir, keep=1, best=2, every=3)
    assert [c.position.step for c in run.checkpoints()] == [2, 3, 5, 6, 8]


def test_what_cannot_be_read_is_neither_counted_nor_removed(run, publish):
    """It may be all that is left, or good again tomorrow."""
    publish(1, 1.0).manifest_path.write_text("{")
    for step in (2, 3, 4):
        publish(step, float(step))
    (run.checkpoints_dir / "step-00000005.ckpt").write_bytes(b"a file of somebody else's")
    publish(6, 6.0)
    checkpoint.prune(run.checkpoints_dir, keep=2, best=1)
    assert [c.step for c in run.checkpoints()] == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("name", ["model.safetensors", "training/shard.pt"])
def test_a_missing_a_cut_and_a_flipped_file_are_noticed_and_named(publish, name):
    for damage, what in (
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes instead of"),
        (lambda path: flip(path, 4), "does not match its checksum"),
    ):
        saved = publish(2)
        damage(saved.path / name)
        problem = str(saved.problem())
        assert problem.startswith(str(saved.path / name))
        assert what in problem


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "{}", '{"format": 2}', '{"format": 2, "position": {"step": 1}, "files": {}}', "\x00"],
)
def test_a_damaged_manifest_is_noticed_and_named(publish, content):
    saved = publish(2)
    saved.manifest_path.write_text(content)
    assert str(saved.problem()).startswith(f"{saved.manifest_path}: ")
    with pytest.raises(RunError, match="damaged"):
        _ = saved.position


def test_a_missing_manifest_is_noticed(publish):
    saved = publish(2)
    saved.manifest_path.unlink()
    assert str(saved.problem()).startswith(f"{saved.manifest_path}: missing")


def test_a_manifest_of_another_format_is_refused_with_both_numbers(publish):
    saved = publish(2)
    manifest = json.loads(saved.manifest_path.read_text())
    saved.manifest_path.write_text(json.dumps({**manifest, "format": 99}))
    assert "format 99, this version of longseq reads 2" in str(saved.problem())


def test_every_flipped_bit_of_a_manifest_is_noticed(publish):
    saved = publish(1)
    whole = saved.manifest_path.read_bytes()
    for index in range(len(whole)):
        flip(saved.manifest_path, index, bit=index % 8)
        assert str(saved.problem()).startswith(f"{saved.manifest_path}: "), index
        saved.manifest_path.write_bytes(whole)
    assert saved.problem() is None


def test_two_hundred_random_truncations_and_flipped_bits_are_found_named_and_passed_over(run, publish):
    """Any file, any place: the damaged file is named, and the checkpoint before it is the newest."""
    good, damaged = publish(7), publish(8)
    files = sorted(path for path in damaged.path.rglob("*") if path.is_file())
    draw = random.Random(0)
    for number in range(200):
        path = draw.choices(files, weights=[file.stat().st_size for file in files])[0]
        whole = path.read_bytes()
        if number % 2:
            path.write_bytes(whole[: draw.randrange(len(whole))])
        else:
            flip(path, draw.randrange(len(whole)), bit=draw.randrange(8))
        newest, problems = run.newest_checkpoint()
        assert newest == good, f"{path}, damage {number}"
        assert len(problems) == 1
        assert str(problems[0]).startswith(f"{path}: ")
        path.write_bytes(whole)
    assert run.newest_checkpoint() == (damaged, [])
