"""Before a start trains: do all processes meet, and is every node fit? Names the node that is not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from longseq.devices import claim, identity
from longseq.errors import EXIT_UNFIT, LongseqError
from longseq.launch.slurm.interfaces import choose_interface, own_address
from longseq.launch.slurm.place import Limits, Place
from longseq.measure.memory import gib
from longseq.runs.code import other_than_told
from longseq.training.collectives import PATIENCE, ControlGroup
from longseq.training.rehearsal import all_reduce_rate
from longseq_data.files import write_text

_POLL_SECONDS, _LISTING_SECONDS = 0.1, 0.5
_HEARING_SECONDS = 30.0


class UnfitError(LongseqError):
    """A node that cannot train."""

    exit_code = EXIT_UNFIT


class NotMetError(UnfitError):
    """Processes that did not find each other: another start may."""


def meet(
    place: Place,
    device: torch.device,
    limits: Limits,
    port_file: Path | None = None,
    met: Callable[[TCPStore], None] = lambda store: None,
) -> tuple[TCPStore | None, str]:
    """Every process calls it: they meet, say what they see, and try a sum. Afterwards the process group is there.

    port_file: where rank 0 says on which port it listens; None: on the place's own, or not at all.
    met: called when all have met, before the first collective.

    Returns:
        what the processes can leave each other messages in (None for one process), and a line for people.

    Raises:
        NotMetError: naming the nodes that are missing, or cannot talk to the others.
        UnfitError: naming the nodes that are unfit, and why.
    """
    room = shutil.disk_usage(tempfile.gettempdir()).free
    problem = _problem(device, room, limits)
    if place.local_rank == 0 and not problem:
        problem = other_than_told()
    if place.world == 1:
        if problem:
            raise UnfitError(f"{place.node_of(0)}: {problem}")
        # Else whoever needs a group of one process would listen on a port, which another one may have.
        alone = HashStore()
        choose_interface(place, alone)
        claim(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=alone, rank=0, world_size=1)
        return None, f"1 process on {place.node_of(0)}; {gib(room)} free in {tempfile.gettempdir()}"
    store = _all_there(place, device, problem, limits, port_file)
    choose_interface(place, store)
    met(store)
    claim(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _said_by(place):
        dist.init_process_group(
            backend,
            store=PrefixStore("training", store),
            rank=place.rank,
            world_size=place.world,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        ControlGroup().barrier()
        clocks = _check_clocks(place, limits)
        rate = all_reduce_rate(device)
        if rate / 1e9 < limits.gb_a_second:
            raise UnfitError(_slowest(place, device, rate, limits))
    return store, (
        f"{place.world} processes on {', '.join(place.nodes)}; {backend}: an all-reduce of 64 MiB runs at "
        f"{rate / 1e9:.2f} GB/s; clocks within {clocks:.3f} s; {gib(room)} free in {tempfile.gettempdir()}"
    )


def _problem(device: torch.device, room: int, limits: Limits) -> str:
    """What is wrong with this process's node; empty if nothing is."""
    if room < limits.disk_gib * 2**30:
        return f"only {gib(room)} free in {tempfile.gettempdir()} (preflight_disk_gib={limits.disk_gib:g})."
    if device.type != "cuda":
        return ""
    there, local = torch.cuda.device_count(), device.index
    if there <= local:
        return f"{there} GPUs are visible, and GPU {local} is needed."
    try:
        ones = torch.ones(256, 256, device=device)
        right = bool((ones @ ones == 256).all())
    except RuntimeError as error:
        return f"GPU {local} fails: {str(error).splitlines()[0]}"
    return "" if right else f"GPU {local} gives wrong products."


def _all_there(place: Place, device: torch.device, problem: str, limits: Limits, port_file: Path | None) -> TCPStore:
    port = place.port
    try:
        if place.rank == 0:
            store = _listen(place, limits, port_file)
        else:
            port = _port(place, limits, port_file)
            store = TCPStore(place.address, port, timeout=timedelta(seconds=limits.seconds), wait_for_workers=False)
        own = "" if problem else identity(device)
        hello = [socket.gethostname(), problem, own_address(place.address), own]
        store.set(f"hello/{place.rank}", json.dumps(hello))
        if place.rank == 0:
            store.set("verdict", json.dumps(_verdict(store, place, limits)))
        store.set_timeout(timedelta(seconds=limits.seconds + 60))
        kind, verdict = json.loads(store.get("verdict"))
    except RuntimeError as error:
        raise NotMetError(
            f"{place.node}: rank {place.rank} cannot reach rank 0 at {place.address}:{port} "
            f"({str(error).splitlines()[0]})."
        ) from None
    if verdict:
        _all_heard(store, place)
        raise (NotMetError if kind == "missing" else UnfitError)(verdict)
    return store


def _listen(place: Place, limits: Limits, port_file: Path | None) -> TCPStore:
    """Rank 0's store. A port that another process has makes it take the next, where it can tell the others."""
    for port in place.ports() if port_file else (place.port,):
        try:
            store = TCPStore(
                place.address, port, is_master=True, timeout=timedelta(seconds=limits.seconds), wait_for_workers=False
            )
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            reason = error
            continue
        if port_file:
            write_text(port_file, f"{port}\n")
        return store
    raise reason


def _port(place: Place, limits: Limits, port_file: Path | None) -> int:
    """Where rank 0 listens."""
    if port_file is None:
        return place.port
    deadline = time.monotonic() + limits.seconds
    # A listing asks the server of a network file system anew; a look for one name may not.
    while port_file.name not in os.listdir(port_file.parent):  # noqa: PTH208
        if time.monotonic() > deadline:
            raise NotMetError(
                f"{place.node_of(0)}: rank 0 has not begun to listen after {limits.seconds:g} s (preflight_seconds)."
            )
        time.sleep(_LISTING_SECONDS)
    return int(port_file.read_text())


def _all_heard(store: TCPStore, place: Place) -> None:
    """Rank 0 holds the store, and waits a while for those who are there to read the verdict in it."""
    with suppress(RuntimeError):
        store.set(f"heard/{place.rank}", "")
        if place.rank == 0:
            there = [f"heard/{rank}" for rank in range(place.world) if store.check([f"hello/{rank}"])]
            deadline = time.monotonic() + _HEARING_SECONDS
            while not store.check(there) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)


def _verdict(store: TCPStore, place: Place, limits: Limits) -> tuple[str, str]:
    """Rank 0 waits for all others, and says who is "missing" or "unfit": a sentence, empty if nobody is."""
    deadline, missing = time.monotonic() + limits.seconds, set(range(place.world))
    while missing and time.monotonic() < deadline:
        missing -= {rank for rank in missing if store.check([f"hello/{rank}"])}
        time.sleep(_POLL_SECONDS if missing else 0)
    if missing:
        nodes = ", ".join(dict.fromkeys(place.node_of(rank) for rank in sorted(missing)))
        return "missing", (
            f"{nodes}: no sign of rank {', '.join(map(str, sorted(missing)))} after {limits.seconds:g} s "
            "(preflight_seconds)."
        )
    hellos = {rank: json.loads(store.get(f"hello/{rank}")) for rank in range(place.world)}
    problems = {(place.node_of(rank), hello[1]): None for rank, hello in hellos.items() if hello[1]}
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, (_, _, _, gpu) in hellos.items():
        if gpu:
            holders.setdefault((place.node_of(rank), gpu), []).append(rank)
    for (node, gpu), ranks in holders.items():
        if len(ranks) > 1:
            words = (
                f"rank {', '.join(map(str, ranks))} have the same GPU ({gpu}): let each task see all GPUs "
                "of its node (srun: [--gpu-bind=none] in the site's profile), or exactly one of its own "
                "(--gpus-per-task=1)."
            )
            problems[node, words] = None
    nodes = ", ".join(dict.fromkeys(node for node, _ in problems))
    first = f"{nodes}: unfit. " if "," in nodes else ""  # the job's script goes by what the sentence begins with
    return "unfit", first + " ".join(f"{node}: {problem}" for node, problem in problems)


def _check_clocks(place: Place, limits: Limits) -> float:
    """By how much the clocks differ, in seconds."""
    dist.barrier()
    times: list[float] = [0.0] * place.world
    dist.all_gather_object(times, time.time())
    odd = odd_clocks({place.node_of(rank): now for rank, now in enumerate(times)}, limits.clock_seconds)
    if odd:
        raise UnfitError(f"{odd} (preflight_clock_seconds={limits.clock_seconds:g}).")
    return max(times) - min(times)


def odd_clocks(clocks: Mapping[str, float], limit: float) -> str:
    """Which nodes have another time than most: words that begin with them, or with all where no time is that of most.

    clocks: seconds, of each node. Empty where they agree within ``limit``.
    """
    usual = sorted(clocks, key=clocks.__getitem__)[len(clocks) // 2]
    away = {node: now - clocks[usual] for node, now in clocks.items() if abs(now - clocks[usual]) > limit}
    if not away:
        return ""
    if 2 * len(away) >= len(clocks):
        first = min(clocks.values())
        times = ", ".join(f"{node} +{now - first:.0f} s" for node, now in clocks.items())
        return f"{', '.join(clocks)}: their clocks differ, and it cannot be told which are right: {times}"
    (node, seconds), *others = away.items()
    if not others:
        return f"{node}: its clock is {seconds:+.0f} s away from {usual}'s"
    return f"{', '.join(away)}: their clocks are {', '.join(f'{s:+.0f} s' for s in away.values())} away from {usual}'s"


def _slowest(place: Place, device: torch.device, rate: float, limits: Limits) -> str:
    """Which node is to blame for a slow sum: each one against the first, in turn."""
    each = place.world // len(place.nodes)
    rates = {}
    for number, node in enumerate(place.nodes[1:], 1):
        pair = [0, number * each]
        group = dist.new_group(pair)
        if place.rank in pair:
            message = torch.ones(16 << 20, device=device)
            dist.all_reduce(message, group=group)
            began = time.perf_counter()
            dist.all_reduce(message, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates[node] = message.numel() * 4 / (time.perf_counter() - began) / 1e9
        dist.barrier()
    told: list[dict[str, float]] = [rates]
    dist.broadcast_object_list(told, src=0)
    alone = "; ".join(f"{node} at {speed:.2f}" for node, speed in sorted(told[0].items(), key=lambda item: item[1]))
    pairs = f" Each with {place.nodes[0]} alone: {alone}." if alone else ""
    return (
        f"{min(told[0], key=lambda node: told[0][node]) if told[0] else place.nodes[0]}: an all-reduce runs at "
        f"{rate / 1e9:.2f} GB/s (preflight_gb_a_second={limits.gb_a_second:g}).{pairs}"
    )


@contextmanager
def _said_by(place: Place) -> Iterator[None]:
    """What a library's error does not say: where, and what to look at."""
    try:
        yield
    except RuntimeError as error:
        raise NotMetError(
            f"{', '.join(place.nodes)}: they met, but rank {place.rank} on {place.node} cannot talk to all others "
            f"({str(error).splitlines()[0]}). {LOOK_AT_INTERFACES}"
        ) from error


LOOK_AT_INTERFACES = (
    "Is the network between the nodes, and the interface that NCCL or gloo takes (NCCL_SOCKET_IFNAME, "
    "GLOO_SOCKET_IFNAME in environment of the site's profile), the right one?"
)
