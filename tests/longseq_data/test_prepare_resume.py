"""A preparation that is stopped, started again, or meets what is there already."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from corpora import config, data_files, expected, found
from longseq_data.errors import DataError
from longseq_data.prepare import map_stage, reduce_stage
from longseq_data.prepare import prepare as preparing
from longseq_data.prepare.prepare import prepare


def test_an_interruption_at_any_step_changes_nothing(files, tmp_path, small_parts, monkeypatch):
    """Stopped before a rename, which is how every step ends: after none twice, after one twice, and so on."""
    prepare(config(files, tmp_path / "whole"))
    rename, stopped = Path.replace, 0
    taken: list[int] = []

    def stopping(self: Path, target: Path) -> Path:
        taken.append(1)
        if len(taken) > stopped // 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    while True:
        taken.clear()
        try:
            prepare(config(files, tmp_path / "c"))
            break
        except KeyboardInterrupt:
            stopped += 1
            assert not (tmp_path / "c").exists()
            assert stopped < 500
    assert stopped > 15
    assert data_files(tmp_path / "c") == data_files(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_done_twice(files, tmp_path, small_parts, monkeypatch):
    stored, shards = [], []
    store, reduce = map_stage.store, preparing.reduce_shard
    monkeypatch.setattr(map_stage, "store", lambda task, path, *rest: (stored.append(path), store(task, path, *rest)))

    def stop_at_two(task, shard):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(shard)
        reduce(task, shard)

    monkeypatch.setattr(preparing, "reduce_shard", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(files, tmp_path / "c"))
    monkeypatch.setattr(preparing, "reduce_shard", lambda task, shard: (shards.append(shard), reduce(task, shard)))
    prepare(config(files, tmp_path / "c"))
    assert len(stored) == len(set(stored)) > 3
    assert shards == [0, 1, 2, 3]


@pytest.fixture
def interrupted(files, tmp_path, monkeypatch):
    """A copy of the files, and a preparation of them that was stopped before its second half."""
    copies = [tmp_path / Path(name).name for name in files]
    for name, copy in zip(files, copies, strict=True):
        copy.write_bytes(Path(name).read_bytes())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "reduce_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(list(map(str, copies)), tmp_path / "c"))
    return copies


def test_another_configuration_is_said_and_starts_over_only_when_told(interrupted, tmp_path):
    names = list(map(str, interrupted))
    with pytest.raises(DataError, match=r"c\.partial was begun with other .*: min_length was 1 and is 9; .* --restart"):
        prepare(config(names, tmp_path / "c", min_length=9))
    manifest, _ = prepare(config(names, tmp_path / "c", min_length=9), restart=True)
    assert manifest.settings["min_length"] == 9
    assert found(tmp_path / "c") == expected(names, keep=lambda i, s, t: len(s) >= 9)


def test_workers_and_memory_may_change_between_starts(interrupted, tmp_path):
    names = list(map(str, interrupted))
    prepare(config(names, tmp_path / "c", workers=2, memory_mb=64))
    assert found(tmp_path / "c") == expected(names)


def test_a_changed_source_is_said(interrupted, tmp_path):
    names = list(map(str, interrupted))
    interrupted[1].write_text(">new\nACD\n")
    with pytest.raises(DataError, match=r"part1\.fasta has changed; .* --restart"):
        prepare(config(names, tmp_path / "c"))
    with pytest.raises(DataError, match=r"part1\.fasta is no longer among the sources"):
        prepare(config([names[0], names[2]], tmp_path / "c"))


def test_a_source_that_grows_while_it_is_read_is_refused(files, tmp_path, monkeypatch):
    grown = tmp_path / "grown.fasta"
    grown.write_bytes(Path(files[1]).read_bytes())
    names, store, once = [files[0], str(grown)], map_stage.store, []

    def storing(*args):
        if not once:
            once.append(grown.open("a").write(">late\nMKV\n"))
        return store(*args)

    with monkeypatch.context() as patched:
        patched.setattr(map_stage, "store", storing)
        with pytest.raises(DataError, match=r"grown\.fasta has changed while it was read: .* --restart"):
            prepare(config(names, tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    prepare(config(names, tmp_path / "c"), restart=True)
    assert found(tmp_path / "c") == expected(names)


def test_what_a_version_before_has_put_aside_is_read_anew(interrupted, tmp_path):
    names = list(map(str, interrupted))
    parts = tmp_path / "c.partial" / "parts"
    plan = json.loads((parts / "plan.json").read_text())
    del plan["format"]
    (parts / "plan.json").write_text(json.dumps(plan))
    for aside in (parts / "map").glob("*.arrow"):
        aside.write_bytes(b"of another form")
    prepare(config(names, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(names)


def test_a_corpus_that_is_there_is_left_as_it_is(files, tmp_path):
    first, new = prepare(config(files, tmp_path / "c"))
    assert new
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    again, new = prepare(config(files[::-1], tmp_path / "c", workers=2))
    assert not new
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == stamps


def test_a_name_that_is_taken_is_refused_unless_told(files, tmp_path):
    prepare(config(files, tmp_path / "c"))
    with pytest.raises(DataError, match=r"c exists, and max_length was null and is 80; .* --overwrite"):
        prepare(config(files, tmp_path / "c", max_length=80))
    with pytest.raises(DataError, match=r"c exists, and .*part2\.fasta\.gz is no longer among the sources"):
        prepare(config(files[:2], tmp_path / "c"))
    prepare(config(files, tmp_path / "c", max_length=80), overwrite=True)
    assert found(tmp_path / "c") == expected(files, keep=lambda i, s, t: len(s) <= 80)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    (tmp_path / "mine").mkdir()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="mine exists, and is no prepared corpus"):
            prepare(config(files, tmp_path / "mine"), overwrite=overwrite)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").touch()
    with pytest.raises(DataError, match="was not made by a preparation"):
        prepare(config(files, tmp_path / "other"))


def test_a_second_preparation_of_the_same_name_is_told(files, tmp_path, monkeypatch):
    def second(*_: object) -> None:
        # a process of its own: a lock holds between processes
        code = (
            "from longseq_data.prepare.prepare import prepare\nfrom longseq_data.prepare.config import PrepareConfig\n"
            f"prepare(PrepareConfig(sources=[{files[0]!r}], output={str(tmp_path / 'c')!r}, workers=1))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f"is being prepared already (process {os.getpid()}); wait" in done.stderr
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "reduce_shard", second)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(files, tmp_path / "c"))


def test_a_full_disk_is_said_and_the_work_goes_on_after(files, tmp_path, small_parts, monkeypatch):

    write = reduce_stage._Hashed.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reduce_stage._Hashed, "write", full)
    with pytest.raises(DataError, match=r"c: cannot be written \(No space left on device\); make room"):
        prepare(config(files, tmp_path / "c"))
    assert not list((tmp_path / "c.partial").rglob("*.partial"))
    monkeypatch.setattr(reduce_stage._Hashed, "write", write)
    prepare(config(files, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(files)


def test_a_worker_that_is_killed_has_its_work_done_by_another(files, tmp_path, small_parts, monkeypatch):
    prepare(config(files, tmp_path / "whole"))
    for stage in ("_map_any", "reduce_shard"):
        mark = tmp_path / f"died in {stage}"
        with monkeypatch.context() as patched:
            patched.setattr(preparing, stage, partial(_die_once, mark, getattr(preparing, stage)))
            prepare(config(files, tmp_path / stage, workers=2))
        assert mark.exists()
        assert data_files(tmp_path / stage) == data_files(tmp_path / "whole")


def _die_once(mark: Path, work, *arguments):
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return work(*arguments)


def test_work_that_kills_every_worker_is_said_and_goes_on_after(files, tmp_path, small_parts, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(preparing, "_map_any", _die)
        with pytest.raises(DataError, match="killed several worker processes, perhaps because memory ended; lower"):
            prepare(config(files, tmp_path / "c", workers=2))
    prepare(config(files, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(files)


def _die(*_: object) -> None:
    os.kill(os.getpid(), 9)
