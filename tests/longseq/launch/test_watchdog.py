"""Which rank is to blame when a training stands still: by what the ranks have left, and by the time that passes."""

from __future__ import annotations

import pickle
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import HashStore

from longseq.launch.slurm import watchdog
from longseq.launch.slurm.place import Place
from longseq.launch.slurm.watchdog import Heartbeats, Watchdog

NODES = ("node1", "node2")


@pytest.fixture
def heartbeats() -> Heartbeats:
    """Of four ranks, two a node, in their third step."""
    found = Heartbeats(Place(0, 0, 4, NODES, "127.0.0.1", 1), 600)
    for rank in range(4):
        found.hear(rank, "12 0 0")
    return found


def test_a_rank_that_goes_silent_is_named_and_ends_the_start_later(heartbeats):
    for beat in range(1, 150):
        for rank in (0, 1, 2):
            heartbeats.hear(rank, f"{12 + beat} {beat} 0")
        text, ends = heartbeats.look(5.0)
        assert ends == (5 * beat >= 600)
        if 5 * beat < 30:
            assert text == ""
        else:
            assert text == f"node2: rank 3 has not answered for {5 * beat} s"


def test_a_rank_that_answers_again_is_forgiven(heartbeats):
    assert heartbeats.look(40.0) == ("node1, node2: rank 0, 1, 2, 3 have not answered for 40 s", False)
    for rank in range(4):
        heartbeats.hear(rank, "12 1 0")
    assert heartbeats.look(5.0) == ("", False)


def test_the_rank_that_the_others_wait_for_is_named(heartbeats):
    """All processes live; one has not begun the backward pass in which the others wait."""
    for beat in range(1, 200):
        for rank in range(4):
            heartbeats.hear(rank, f"{14 if rank != 2 else 13} {beat} 0")
        text, ends = heartbeats.look(5.0)
        assert ends == (5 * beat >= 600)
        assert text == (f"node2: rank 2 has kept the others waiting for {5 * beat} s" if ends else "")


def test_where_all_wait_at_the_same_place_no_node_is_blamed_alone(heartbeats):
    for beat in range(1, 121):
        for rank in range(4):
            heartbeats.hear(rank, f"12 {beat} 0")
        text, ends = heartbeats.look(5.0)
    assert ends
    assert text == "node1, node2: no rank has gone on for 600 s, all at the same place"


def test_a_checkpoint_that_is_being_written_is_a_sign_of_life(heartbeats):
    for beat in range(1, 400):
        for rank in range(4):
            heartbeats.hear(rank, f"12 {beat} {beat * (2 << 20) if rank == 1 else 0}")
        assert heartbeats.look(5.0) == ("", False)


def test_the_first_step_may_take_long():
    heartbeats = Heartbeats(Place(0, 0, 2, NODES, "127.0.0.1", 1), 600)
    for beat in range(1000):
        for rank in range(2):
            heartbeats.hear(rank, f"0 {beat} 0")
        assert heartbeats.look(5.0) == ("", False)


def test_the_others_see_that_rank_0_is_silent():
    heartbeats = Heartbeats(Place(1, 0, 2, NODES, "127.0.0.1", 1), 20)
    heartbeats.hear(0, "12 3 0")
    assert heartbeats.look(19.0) == ("", False)
    assert heartbeats.look(2.0) == ("node1: rank 0 has not answered for 21 s", True)


def test_every_rank_leaves_its_last_collectives_when_the_start_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_BEAT_SECONDS", 0.05)
    codes, said = [], []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(7))
        dogs = []
        for rank in range(2):
            place = Place(rank, rank, 2, ("node1",), "127.0.0.1", store.port)
            trace = tmp_path / f"00001.collectives-{rank}"
            dogs.append(Watchdog(place, store.port, 600, tmp_path / "silent", trace, said.append))
        beats = [threading.Thread(target=dog._beat) for dog in dogs]
        for beat in beats:
            beat.start()
        dogs[0]._leave("node1: rank 1 has kept the others waiting for 600 s")
        assert dogs[1].leaving.wait(30)
        for dog, beat in zip(dogs, beats, strict=True):
            dog.over.set()
            beat.join(30)
    finally:
        dist.destroy_process_group()
    assert len(codes) == len(said) == 1
    for rank in range(2):
        entry = pickle.loads((tmp_path / f"00001.collectives-{rank}").read_bytes())["entries"][-1]
        assert (entry["profiling_name"], entry["input_sizes"]) == ("gloo:all_reduce", [[7]])
