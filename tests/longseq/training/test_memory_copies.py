"""Copies of the last steps in the nodes' memory, and what the next start makes of them; two nodes are two folders."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from longseq.launch.slurm.place import Place
from longseq.launch.slurm.recall import recall
from longseq.runs import starts
from longseq.runs.run import Run
from longseq.training import memory_copies
from longseq.training.memory_copies import MemoryCopies, parts_in
from longseq.training.shards import LOOPS, shard_name
from positions import position

NODES = ("node1", "node2")


class Meeting:
    """Stands for the group of two ranks, which are threads of this process."""

    def __init__(self) -> None:
        self.values, self.all_there = {}, threading.Barrier(2)

    def gather(self, value: str) -> list[str]:
        self.values[threading.current_thread().name] = value
        self.all_there.wait(30)
        return [self.values[name] for name in sorted(self.values)]


def at_once(work: Callable[[int], object]) -> list[object]:
    """What two ranks give that do the same at the same time."""
    found: list[object] = [None, None]

    def one(rank: int) -> None:
        found[rank] = work(rank)

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def files_of(rank: int, step: int) -> dict[str, object]:
    shard = {shard_name(rank): {"exp_avg:0:w": torch.full((5,), float(10 * step + rank))}}
    return shard if rank else {"model.safetensors": {"w": torch.full((3,), float(step))}, LOOPS: b"loops", **shard}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


@pytest.fixture
def ranks(start: Run, memory: list[Path]) -> list[MemoryCopies]:
    meeting = Meeting()
    made = at_once(lambda rank: MemoryCopies(start, rank, 2, 1, meeting, f"127.0.0.1 {memory[rank]}"))
    assert all(isinstance(each, MemoryCopies) for each in made)
    return made  # type: ignore[return-value]


def copy(ranks: list[MemoryCopies], *steps: int) -> None:
    for step in steps:
        for number, rank in enumerate(ranks):
            rank.start(files_of(number, step), replace(position(step), world_size=2), lambda: None)
        until(lambda: all(rank.ready for rank in ranks))


def recalled(run: Run, memory: list[Path]) -> tuple[Run, str]:
    """The next start, and what its rank 0 says."""
    number = starts.take(run.starts_dir, "slurm job 7")
    later, store = Run(run.path, number), HashStore()
    places = [Place(rank, 0, 2, NODES, "127.0.0.1", 0) for rank in range(2)]
    said = at_once(lambda rank: recall(later, places[rank], store, memory[rank]))
    assert said[1] == ""
    return later, str(said[0])


def steps_of(run: Run) -> list[int]:
    return [checkpoint.step for checkpoint in run.checkpoints()]


def test_both_nodes_have_both_parts_of_the_last_two_steps(ranks, memory, start):
    copy(ranks, 5, 6, 7)
    for folder in memory:
        found = parts_in(folder, start.start)
        assert {step: sorted(parts) for step, parts in found.items()} == {6: [0, 1], 7: [0, 1]}
        shards = [load_file(folder / f"00001/step-00000007.ckpt/{shard_name(rank)}") for rank in (0, 1)]
        assert [shard["exp_avg:0:w"].tolist() for shard in shards] == [[70.0] * 5, [71.0] * 5]


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_lost_node_costs_no_step(ranks, memory, start, lost):
    copy(ranks, 5, 6)
    if lost is not None:
        shutil.rmtree(memory[lost])
    later, said = recalled(start, memory)
    where = {None: "node2", 0: "node2", 1: "node1"}[lost]
    assert said == f"going on from step 6, which start 1 has left in the memory of {where}"
    newest, damaged = later.newest_checkpoint()
    assert (newest.position, damaged) == (replace(position(6), world_size=2, unlogged=[0.0] * 3), [])
    assert load_file(newest.weights_path)["w"].tolist() == [6.0] * 3
    assert load_file(newest.path / shard_name(1))["exp_avg:0:w"].tolist() == [61.0] * 5
    assert (newest.path / LOOPS).read_bytes() == b"loops"
    assert not any(folder.exists() for folder in memory)  # it is on the disk now


def test_the_parts_of_a_step_that_was_begun_are_no_step(ranks, memory, start):
    """Killed while it copied: the step before is whole everywhere."""
    copy(ranks, 5, 6)
    for folder in memory:
        (folder / "00001/step-00000006.ckpt/.part-1.json").unlink()
    later, said = recalled(start, memory)
    assert (steps_of(later), "step 5" in said) == ([5], True)


def test_where_both_copies_are_lost_the_disk_has_the_newest(ranks, memory, start):
    copy(ranks, 5)
    for folder in memory:
        (folder / "00001/step-00000005.ckpt/.part-1.json").unlink()
    later, said = recalled(start, memory)
    assert said == (
        "the nodes' memory has no whole copy of a step (both of rank 1 are lost): going on from the newest checkpoint "
        "on the disk"
    )
    assert steps_of(later) == []


def test_a_copy_that_was_damaged_is_not_used(ranks, memory, start):
    copy(ranks, 5)
    for folder in memory:
        path = folder / f"00001/step-00000005.ckpt/{shard_name(1)}"
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
    later, said = recalled(start, memory)
    assert "cannot be used" in said
    assert f"{shard_name(1)} does not match its checksum): going on from the newest checkpoint on the disk" in said
    assert (steps_of(later), list(later.checkpoints_dir.iterdir())) == ([], [])


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


def test_a_node_without_room_is_named_and_nobody_copies_more(ranks, memory, start, capfd, monkeypatch):
    copy(ranks, 5)

    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(memory_copies, "write", full)
    ranks[0].start(files_of(0, 6), position(6), lambda: None)
    until(lambda: not threading.Thread.is_alive(ranks[0]._thread))
    said = f"rank 0: no more copies in {memory[0]}/00001 (No space left on device): after a loss"
    assert said in capfd.readouterr().err
    assert not ranks[0].ready  # by which no rank begins another
    assert "step 5" in recalled(start, memory)[1]


def test_somebody_who_finds_the_port_leaves_nothing(start, memory):
    meeting, known = Meeting(), {}

    class Spied(Meeting):
        def gather(self, value: str) -> list[str]:
            known[threading.current_thread().name] = value
            if threading.current_thread().name == "1":
                port = int(value.split()[1])
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    note = json.dumps({"rank": 9, "position": {"step": 5}, "files": {}}).encode()
                    stranger.sendall(b"0" * 32 + len(note).to_bytes(4, "little") + note)
            return meeting.gather(value)

    spied = Spied()
    ranks = at_once(lambda rank: MemoryCopies(start, rank, 2, 1, spied, f"127.0.0.1 {memory[rank]}"))
    copy(ranks, 5)  # type: ignore[arg-type]
    assert sorted(parts_in(memory[1], 1)[5]) == [0, 1]
