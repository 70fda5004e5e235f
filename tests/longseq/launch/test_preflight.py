"""Before a start trains: which node is missing or unfit, and where a task stands among all."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from longseq.errors import EXIT_UNFIT, LongseqError
from longseq.launch.slurm import preflight
from longseq.launch.slurm.interfaces import choose_interface, interface_of, own_address
from longseq.launch.slurm.place import Limits, Place, host_names, refuse_several_tasks
from longseq.launch.slurm.preflight import UnfitError, meet
from longseq.runs.run import Run
from longseq.training.worker import outcome

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
    ports = {Place.of_slurm(TASK, start=start).port for start in range(1, 200)}
    assert len(ports) == 199  # what is left of a start before still has its own, without a restart of the job, too
    assert Place.of_slurm({**TASK, "SLURM_LAUNCH_NODE_IPADDR": ""}).address == "node1"


def test_a_node_without_room_is_named():
    place = Place.of_slurm({**TASK, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node7"})
    with pytest.raises(UnfitError, match=r"node7: only .* free in .* \(preflight_disk_gib=1e\+09\)") as refusal:
        meet(place, CPU, Limits(disk_gib=1e9))
    assert refusal.value.exit_code == EXIT_UNFIT


def places(count: int, job: str) -> list[Place]:
    return [Place.of_slurm({**TASK, "SLURM_PROCID": str(rank), "SLURM_JOB_ID": job}) for rank in range(count)]


def said_by(parts: list[Place], limits: list[Limits], port_file: Path | None = None) -> list[str]:
    """What several ranks are told that meet in threads of this process; a preflight that fails forms no group."""
    said = [""] * len(parts)

    def one(index: int) -> None:
        try:
            meet(parts[index], CPU, limits[index], port_file)
        except UnfitError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=one, name=str(index), args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return said


def test_ranks_that_do_not_come_are_named_with_their_node():
    said = said_by(places(2, "41"), [Limits(seconds=5)] * 2)
    assert said == ["node2: no sign of rank 2, 3 after 5 s (preflight_seconds)."] * 2


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


def test_a_node_that_would_run_other_code_is_named_as_unfit(monkeypatch):
    """One process of each node looks; the job's script takes a spare for it."""
    ranks = [replace(place, local_rank=place.rank % 2) for place in places(4, "53")]
    monkeypatch.setattr(preflight, "other_than_told", iter(["", "the job's code is elsewhere."]).__next__)
    said = said_by(ranks, [Limits()] * 4)
    assert len(set(said)) == 1
    assert said[0] in ("node1: the job's code is elsewhere.", "node2: the job's code is elsewhere.")


def test_a_rank_that_reaches_nobody_says_so():
    alone = Place.of_slurm({**TASK, "SLURM_JOB_ID": "47"})
    (said,) = said_by([alone], [Limits(seconds=1)])
    assert said.startswith("node2: rank 3 cannot reach rank 0 at 127.0.0.1:")


def test_an_unfit_node_has_an_exit_code_of_its_own(tmp_path):
    def unfit() -> int:
        raise UnfitError("node7: no room.")

    assert outcome(unfit, Run(tmp_path)) == (EXIT_UNFIT, "node7: no room.")


def test_ranks_find_rank_0_where_others_have_its_port(tmp_path):
    parts = places(4, "53")
    with contextlib.ExitStack() as held:
        for port in list(parts[0].ports())[:3]:
            other = held.enter_context(socket.socket())
            other.bind(("0.0.0.0", port))
            other.listen()
        limits = [Limits(), Limits(), Limits(), Limits(disk_gib=1e9)]  # so that no group is formed
        said = said_by(parts, limits, tmp_path / "00001.port")
    assert len(set(said)) == 1
    assert said[0].startswith("node2: only ")
    assert int((tmp_path / "00001.port").read_text()) == list(parts[0].ports())[3]


def test_a_rank_0_that_never_listens_is_named(tmp_path):
    (said,) = said_by(places(4, "59")[3:], [Limits(seconds=1)], tmp_path / "00001.port")
    assert said == "node1: rank 0 has not begun to listen after 1 s (preflight_seconds)."


def test_the_interface_is_the_one_with_the_address():
    for number, name in socket.if_nameindex():
        assert number
        address = address_of(name)
        if address:
            assert interface_of(address) == ("lo" if address.startswith("127.") else name)
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.1.1") == "lo"
    assert interface_of("203.0.113.7") == interface_of("") == ""


def address_of(name: str) -> str:
    """By another tool."""
    done = subprocess.run(["ip", "-4", "-o", "address", "show", "dev", name], capture_output=True, text=True)
    return done.stdout.split()[3].partition("/")[0] if done.stdout else ""


def test_a_users_interface_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_interface(places(4, "61")[0], HashStore())
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("tasks", "refused"), [(None, False), ("1", False), ("2", True)])
def test_a_training_is_not_started_once_a_task(tasks, refused):
    environment = TASK if tasks is None else {**TASK, "SLURM_STEP_NUM_TASKS": tasks}
    with pytest.raises(LongseqError, match="task 3 of 2 that srun") if refused else contextlib.nullcontext():
        refuse_several_tasks(environment, "fit")


def test_several_tasks_are_refused_before_anything_is_made(folder):
    environment = {**os.environ, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    for words in (["fit", "small.yaml", "data.train=a.fasta"], ["resume", "runs/x"]):
        command = [sys.executable, "-m", "longseq.cli", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"longseq {words[0]}: task 1 of 2" in done.stderr
    assert not (folder / "runs").exists()


OPEN_FILES = """
import resource
from longseq.training.worker import raise_open_files
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
raise_open_files()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
"""


def test_a_process_may_open_as_many_files_as_it_may():
    subprocess.run([sys.executable, "-c", OPEN_FILES], check=True)


ONE_GROUP = """
import os, sys
import torch.distributed as dist
from longseq.training.collectives import ControlGroup

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
first, second = ControlGroup(), ControlGroup()
assert first._group is second._group is dist.group.WORLD
assert second.any(rank == 1, False) == [True, False]
assert first.gather(str(rank)) == ["0", "1"]
assert len(dist.distributed_c10d._world.pg_map) == 1
os._exit(0)  # as our workers end: threads of native libraries race with the interpreter's end
"""


def test_there_is_one_control_group():
    command, environment = [sys.executable, "-c", ONE_GROUP], os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    (port,) = free_ports(1)
    ranks = [subprocess.Popen([*command, str(rank), port], env=environment) for rank in range(2)]
    assert [process.wait(60) for process in ranks] == [0, 0]


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


@pytest.mark.parametrize(
    ("clocks", "words"),
    [
        ({"a": 0, "b": 29}, ""),
        ({"a": 0, "b": 40}, "a, b: their clocks differ, and it cannot be told which are right: a +0 s, b +40 s"),
        ({"a": 40, "b": 0, "c": 5}, "a: its clock is +35 s away from c's"),
        ({"a": 0, "b": 70, "c": 71, "d": 72, "e": 140}, "a, e: their clocks are -71 s, +69 s away from c's"),
        (
            {"a": 0, "b": 0, "c": 90, "d": 90},
            "a, b, c, d: their clocks differ, and it cannot be told which are right: a +0 s, b +0 s, c +90 s, d +90 s",
        ),
    ],
)
def test_nodes_are_blamed_for_their_clock_where_most_others_agree(clocks, words):
    assert preflight.odd_clocks(clocks, 30.0) == words


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]
