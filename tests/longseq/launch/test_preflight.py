"""Before a start trains: which node is missing or unfit, and where a task stands among all."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from longseq.errors import EXIT_UNFIT
from longseq.launch.slurm import preflight
from longseq.launch.slurm.place import Limits, Place, host_names
from longseq.launch.slurm.preflight import UnfitError, meet

CPU = torch.device("cpu")
TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", "node1"),
        ("node[1-3,07],login", "node1 node2 node3 node07 login"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
        ("a-1,b[2]-x", "a-1 b2-x"),
    ],
)
def test_lists_of_nodes_are_read_as_slurm_writes_them(text, names):
    assert list(host_names(text)) == names.split()


def test_a_task_finds_its_place():
    place = Place.of_slurm(TASK)
    assert (place.rank, place.local_rank, place.world) == (3, 1, 4)
    assert [place.node_of(rank) for rank in range(4)] == ["node1", "node1", "node2", "node2"]
    assert 20_000 <= place.port < 32_000
    again = Place.of_slurm({**TASK, "SLURM_RESTART_COUNT": "1"})
    assert again.port != place.port  # what is left of the start before still has its own
    assert Place.of_slurm({**TASK, "SLURM_LAUNCH_NODE_IPADDR": ""}).address == "node1"


def test_a_node_without_room_is_named():
    place = Place.of_slurm({**TASK, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node7"})
    with pytest.raises(UnfitError, match=r"node7: only .* free in .* \(preflight_disk_gib=1e\+09\)") as refusal:
        meet(place, CPU, Limits(disk_gib=1e9))
    assert refusal.value.exit_code == EXIT_UNFIT


def places(count: int, job: str) -> list[Place]:
    return [Place.of_slurm({**TASK, "SLURM_PROCID": str(rank), "SLURM_JOB_ID": job}) for rank in range(count)]


def said_by(parts: list[Place], limits: list[Limits]) -> list[str]:
    """What several ranks are told that meet in threads of this process; a preflight that fails forms no group."""
    said = [""] * len(parts)

    def one(index: int) -> None:
        try:
            meet(parts[index], CPU, limits[index])
        except UnfitError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=one, name=str(index), args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_ranks_that_do_not_come_are_named_with_their_node():
    said = said_by(places(2, "41"), [Limits(seconds=2)] * 2)
    assert said == ["node2: no sign of rank 2, 3 after 2 s (preflight_seconds)."] * 2


class SlowToHear(preflight.TCPStore):
    """On a busy node, what is asked for is read late."""

    def get(self, key: str) -> bytes:
        if threading.current_thread().name != "0":
            time.sleep(0.5)
        return super().get(key)


def test_all_ranks_hear_of_an_unfit_node(monkeypatch):
    monkeypatch.setattr(preflight, "TCPStore", SlowToHear)
    said = said_by(places(4, "43"), [Limits(), Limits(), Limits(), Limits(disk_gib=1e9)])
    assert len(set(said)) == 1
    assert said[0].startswith("node2: only ")


def test_a_rank_that_reaches_nobody_says_so():
    alone = Place.of_slurm({**TASK, "SLURM_JOB_ID": "47"})
    (said,) = said_by([alone], [Limits(seconds=1)])
    assert said.startswith("node2: rank 3 cannot reach rank 0 at 127.0.0.1:")


THREE_NODES = """
import sys, time
import torch
import torch.distributed as dist
from longseq.launch.slurm.place import Limits, Place
from longseq.launch.slurm.preflight import UnfitError, meet

rank = int(sys.argv[1])
real = time.time
time.time = lambda: real() + 100 * (rank == 1)
cases = Limits(), Limits(clock_seconds=1000, gb_a_second=1e6), Limits(clock_seconds=1000)
for port, limits in zip(map(int, sys.argv[2:]), cases):
    try:
        meet(Place(rank, 0, 3, ("node1", "node2", "node3"), "127.0.0.1", port), torch.device("cpu"), limits)
        print("fit", flush=True)
    except UnfitError as error:
        print(error, flush=True)
    dist.destroy_process_group()
"""


def test_a_clock_that_is_off_and_a_slow_network_are_named_with_their_node():
    ports = free_ports(3)
    command = [sys.executable, "-c", THREE_NODES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([*command, str(rank), *ports], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    assert said[0] == said[1] == said[2]
    off, slow, fit = said[0]
    assert off.startswith("node2: its clock is +100 s away from node")
    assert off.endswith("(preflight_clock_seconds=30).")
    assert ": an all-reduce runs at " in slow
    assert "(preflight_gb_a_second=1e+06). Each with node1 alone: node" in slow
    assert fit == "fit"


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]
