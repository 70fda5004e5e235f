"""Copies of the last steps in the nodes' memory, and what the next start makes of them; two nodes are two folders."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore, ProcessGroupGloo

from longseq.errors import SupersededError
from longseq.launch.slurm import recall as recalling
from longseq.launch.slurm.place import Place
from longseq.launch.slurm.recall import recall
from longseq.runs import checkpoint, starts
from longseq.runs.checkpoint import prune
from longseq.runs.run import Run
from longseq.training import memory_copies
from longseq.training.memory_copies import MemoryCopies, make_own, parts_in, remove_old
from longseq.training.shards import LOOPS, shard_name
from positions import position

NODES = ("node1", "node2")


def at_once(work: Callable[[int], object]) -> list[object]:
    """What two ranks give that do the same at the same time."""
    found: list[object] = [None, None]

    def one(rank: int) -> None:
        found[rank] = work(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def files_of(rank: int, step: int) -> dict[str, object]:
    shard = {shard_name(rank): {"exp_avg:0:w": torch.full((5,), float(10 * step + rank))}}
    return shard if rank else {"model.safetensors": {"w": torch.full((3,), float(step))}, LOOPS: b"loops", **shard}


@pytest.fixture
def start(run: Run) -> Run:
    """The first start of a job, which has made steps."""
    run.starts_dir.mkdir(exist_ok=True)
    number = starts.take(run.starts_dir, "slurm job 7")
    starts.note_progress(run.starts_dir, number, starts.Progress(9, 20, 2.5, 100.0, 0.0))
    return Run(run.path, number)


@pytest.fixture
def memory(tmp_path: Path) -> list[Path]:
    return [tmp_path / node for node in NODES]


def ranks_of(start: Run, memory: list[Path]) -> list[MemoryCopies]:
    store = HashStore()
    groups = at_once(lambda rank: ProcessGroupGloo(store, rank, 2, timedelta(seconds=30)))
    return [MemoryCopies(start, rank, 2, 1, groups[rank], memory[rank]) for rank in range(2)]  # type: ignore[arg-type]


@pytest.fixture
def ranks(start: Run, memory: list[Path]) -> list[MemoryCopies]:
    return ranks_of(start, memory)


def copy(ranks: list[MemoryCopies], *steps: int) -> None:
    for step in steps:
        for number, rank in enumerate(ranks):
            rank.start(files_of(number, step), replace(position(step), world_size=2), lambda: None)
        for rank in ranks:
            rank.close()


def test_two_steps_are_in_memory_and_no_third_while_it_is_made(ranks, memory, monkeypatch) -> None:
    seen: list[int] = []
    leave = memory_copies._leave

    def noted(step: Path, *notes: object) -> None:
        seen.append(len(list(step.parent.glob("step-*"))))
        leave(step, *notes)  # type: ignore[arg-type]

    monkeypatch.setattr(memory_copies, "_leave", noted)
    copy(ranks, 10, 20, 30, 40)
    assert seen == [1, 1, *[2] * 6]
    for folder in memory:
        assert sorted(path.name for path in folder.glob("*/step-*")) == ["step-00000030.ckpt", "step-00000040.ckpt"]


def recalled(run: Run, memory: list[Path], keep: int = 3) -> tuple[Run, str]:
    """The next start, and what its rank 0 says."""
    later, store = Run(run.path, starts.take(run.starts_dir, "slurm job 7")), HashStore()
    places = [Place(rank, 0, 2, NODES, "127.0.0.1", 0) for rank in range(2)]

    def one(rank: int) -> str:
        pruned = lambda: prune(later.checkpoints_dir, keep)  # noqa: E731
        return recall(later, places[rank], store, memory[rank], pruned, lambda text: None)

    said = at_once(one)
    assert said[1] == ""
    return later, str(said[0])


def steps_of(run: Run) -> list[int]:
    return [checkpoint.step for checkpoint in run.checkpoints()]


def damage(memory: list[Path], node: int, step: int, rank: int) -> None:
    path = memory[node] / f"00001/step-{step:08d}.ckpt/{shard_name(rank)}"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


def test_both_nodes_have_both_parts_of_the_last_two_steps_for_nobody_else(ranks, memory, start):
    before, _ = os.umask(0o002), copy(ranks, 5, 6, 7)
    os.umask(before)
    for folder in memory:
        found = parts_in(folder, start.start)
        assert {step: sorted(parts) for step, parts in found.items()} == {6: [0, 1], 7: [0, 1]}
        shards = [load_file(folder / f"00001/step-00000007.ckpt/{shard_name(rank)}") for rank in (0, 1)]
        assert [shard["exp_avg:0:w"].tolist() for shard in shards] == [[70.0] * 5, [71.0] * 5]
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_lost_node_costs_no_step(ranks, memory, start, lost):
    copy(ranks, 5, 6)
    if lost is not None:
        shutil.rmtree(memory[lost])
    later, said = recalled(start, memory)
    where = {None: "node1, node2", 0: "node2", 1: "node1"}[lost]
    assert said == f"going on from step 6, which start 1 has left in the memory of {where}"
    newest, damaged = later.newest_checkpoint()
    assert (newest.position, damaged) == (replace(position(6), world_size=2, unlogged=[0.0] * 3), [])
    assert load_file(newest.weights_path)["w"].tolist() == [6.0] * 3
    assert load_file(newest.path / shard_name(1))["exp_avg:0:w"].tolist() == [61.0] * 5
    assert (newest.path / LOOPS).read_bytes() == b"loops"
    assert not any((folder / "00001").exists() for folder in memory)  # it is on the disk now
    assert (start.starts_dir / "00002.recalled").read_text() == "6\n"


@pytest.mark.parametrize("kind", ["link", "open to others", "file", "of another user"])
def test_a_folder_that_is_not_the_users_alone_is_neither_written_nor_read(
    ranks, memory, start, tmp_path, capfd, kind, monkeypatch
):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    if kind == "link":
        memory[1].symlink_to(target)
    elif kind == "file":
        memory[1].touch(mode=0o600)
    else:
        memory[1].mkdir()
        memory[1].chmod(0o755 if kind == "open to others" else 0o700)
    if kind == "of another user":
        own = os.geteuid()
        monkeypatch.setattr(memory_copies.os, "geteuid", lambda: own + 1)
        shutil.rmtree(memory[0], ignore_errors=True)
    copy(ranks, 5)
    assert [rank.failed for rank in ranks] == [True, True]
    assert "not a folder of this user's alone" in capfd.readouterr().err
    assert list(target.iterdir()) == []
    assert parts_in(memory[1], 1) == {}
    with pytest.raises(PermissionError, match="alone"):
        make_own(memory[1])


def test_the_parts_of_a_step_that_was_begun_are_no_step(ranks, memory, start):
    """Killed while it copied: the step before is whole everywhere."""
    copy(ranks, 5, 6)
    for folder in memory:
        (folder / "00001/step-00000006.ckpt/.part-1.json").unlink()
    later, said = recalled(start, memory)
    assert (steps_of(later), "step 5" in said) == ([5], True)


def test_a_damaged_part_is_taken_from_the_other_node(ranks, memory, start):
    copy(ranks, 5, 6)
    damage(memory, 0, 6, 0)
    damage(memory, 1, 6, 1)
    later, said = recalled(start, memory)
    assert said.startswith("going on from step 6, ")
    assert later.newest_checkpoint()[0].step == 6
    assert load_file(later.newest_checkpoint()[0].path / shard_name(1))["exp_avg:0:w"].tolist() == [61.0] * 5
    assert "damaged there: step 6, rank 0 on node1, step 6, rank 1 on node2" in said


def test_where_both_copies_of_a_part_are_damaged_the_step_before_counts(ranks, memory, start):
    copy(ranks, 5, 6)
    for node in (0, 1):
        damage(memory, node, 6, 1)
    later, said = recalled(start, memory)
    assert (steps_of(later), said.partition(",")[0]) == ([5], "going on from step 5")


def test_where_nothing_is_whole_the_disk_has_the_newest(ranks, memory, start):
    copy(ranks, 5)
    for folder in memory:
        (folder / "00001/step-00000005.ckpt/.part-1.json").unlink()
    later, said = recalled(start, memory)
    assert said == (
        "the nodes' memory has no whole copy of a newer step: going on from the newest checkpoint on the disk"
    )
    assert steps_of(later) == []


@pytest.mark.parametrize("what", ["_copied", "publish"])
def test_copies_stay_where_the_disk_takes_nothing_now(ranks, memory, start, monkeypatch, what):
    copy(ranks, 5, 6)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "checkpoints")

    monkeypatch.setattr(recalling, "_PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as now:
        now.setattr(recalling, what, full)
        later, said = recalled(start, memory)
    assert said.startswith(
        "the copy of step 6 in memory cannot be written to the disk now (checkpoints No space left on device"
    )
    assert list(later.checkpoints_dir.iterdir()) == []
    later, said = recalled(start, memory)
    assert (steps_of(later), said.partition(",")[0]) == ([6], "going on from step 6")


def test_a_newer_checkpoint_on_the_disk_is_the_one(ranks, memory, start):
    copy(ranks, 5)
    later, _ = recalled(start, memory)
    copy(ranks, 4)
    assert recalled(start, memory)[1] == ""
    assert steps_of(later) == [5]


def test_copies_of_a_start_before_the_last_that_made_steps_do_not_count(ranks, memory, start):
    """It may have gone on otherwise since: a node that was away comes back with what it had."""
    copy(ranks, 5, 6)
    number = starts.take(start.starts_dir, "slurm job 7")
    starts.note_progress(start.starts_dir, number, starts.Progress(3, 20, 2.5, 100.0, 0.0))
    later, said = recalled(start, memory)
    assert (said, steps_of(later)) == ("", [])


def test_a_start_that_is_overtaken_publishes_nothing(ranks, memory, start, monkeypatch):
    copy(ranks, 6)
    newer = lambda *_: starts.take(start.starts_dir, "slurm job 7")  # noqa: E731
    real = recalling._plan
    monkeypatch.setattr(recalling, "_plan", lambda *words: (newer(), real(*words))[1])
    later, store = Run(start.path, newer()), HashStore()
    with pytest.raises(SupersededError, match="has this run now"):
        recall(later, Place(0, 0, 1, ("node1",), "", 0), store, memory[0], lambda: None, lambda text: None)
    assert steps_of(later) == []
    assert (memory[0] / "00001").exists()


def test_a_recalled_step_goes_with_the_next_one_and_takes_no_place(ranks, memory, start):
    """Of three checkpoints that are kept, three stay that one could go back to."""

    def saved(step: int, **how: bool) -> None:
        partial = checkpoint.partial_path(start.checkpoints_dir, step)
        partial.mkdir(parents=True)
        checkpoint.publish(start.checkpoints_dir, position(step), {}, **how)
        prune(start.checkpoints_dir, 2)

    saved(1), saved(2), saved(3)
    assert steps_of(start) == [2, 3]
    copy(ranks, 5)
    later, _ = recalled(start, memory, keep=2)
    assert steps_of(later) == [2, 3, 5]
    saved(6, recalled=True)
    assert steps_of(later) == [2, 3, 6]
    saved(8)
    assert steps_of(later) == [3, 8]


def test_where_memory_has_no_room_it_is_said_once_and_no_rank_copies(ranks, memory, capfd, monkeypatch):
    monkeypatch.setattr(memory_copies, "room_in", lambda folder: 100 if folder == memory[1] else 1 << 30)
    copy(ranks, 5)
    assert [rank.failed for rank in ranks] == [True, True]
    said = capfd.readouterr().err
    assert said.count("no more copies in memory in this start (rank 1: ") == 1
    assert "two steps need 0.00 GiB of memory, and 0.00 GiB are free" in said
    assert parts_in(memory[0], 1) == {}
    assert all(rank.snapshot == {} for rank in ranks)  # nobody holds its memory, either


def test_a_full_neighbour_ends_copies_and_leaves_the_steps_before(ranks, memory, start, capfd, monkeypatch):
    copy(ranks, 5)
    real = memory_copies._put

    def full(path: Path, *block: object) -> None:
        if NODES[1] in str(path):
            raise OSError(28, "No space left on device", str(path))
        real(path, *block)  # type: ignore[arg-type]

    monkeypatch.setattr(memory_copies, "_put", full)
    copy(ranks, 6)
    assert [rank.ready for rank in ranks] == [False, False]
    assert "rank 1: " in (said := capfd.readouterr().err)
    assert "No space left on device" in said
    assert not (memory[0] / "00001/step-00000006.ckpt").exists()
    assert "step 5" in recalled(start, memory)[1]


def test_a_rank_whose_snapshot_fails_leaves_no_half_step(ranks, memory, capfd):
    def broken() -> None:
        raise RuntimeError("CUDA error")

    for number, made in enumerate((lambda: None, broken)):
        ranks[number].start(files_of(number, 5), replace(position(5), world_size=2), made)
    assert [rank.close() for rank in ranks] == [True, True]
    assert [rank.failed for rank in ranks] == [True, True]
    assert [parts_in(folder, 1) for folder in memory] == [{}, {}]
    assert "(rank 1: CUDA error)" in capfd.readouterr().err


def test_what_ended_jobs_left_goes_and_what_lives_stays(tmp_path, start):
    user = os.geteuid()
    names = [f"longseq-{user}-{job}" for job in ("1", "2", "3", "4")] + ["longseq-12345678-5"]
    for name in names:
        (tmp_path / name).mkdir(mode=0o700)
    hour = time.time() - 7200
    held = memory_copies._lock(tmp_path / names[1], memory_copies.fcntl.LOCK_SH)
    for name in names:
        for path in (*(tmp_path / name).iterdir(), tmp_path / name):
            os.utime(path, (hour, hour))
    os.utime(tmp_path / names[2])
    remove_old(tmp_path / names[3])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in names) == sorted(names[1:])
    held.close()
