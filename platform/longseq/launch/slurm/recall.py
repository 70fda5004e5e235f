"""What the start before has left in the nodes' memory becomes a checkpoint: see longseq.training.memory_copies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from longseq.launch.slurm.place import Place
from longseq.runs import starts
from longseq.runs.checkpoint import TrainingPosition, partial_path, publish
from longseq.runs.run import Run
from longseq.training.memory_copies import is_own, parts_in
from longseq_data.os_errors import said

_INSTEAD = "going on from the newest checkpoint on the disk"
_TRIES, _PAUSE_SECONDS = 3, 5.0  # where the run's folder takes nothing
_BLOCK = 1 << 20


def recall(
    run: Run, place: Place, store: Store, folder: Path, prune_then: Callable[[], None], at: Callable[[str], None]
) -> str:
    """Every process calls it, before anything is read of the run. On rank 0: a sentence that says what came of it.

    Only copies of the job's start that has made the last step count, and only newer ones than all checkpoints on the
    disk. One process of each node writes those parts that it is asked for; rank 0 gives the checkpoint its name. A
    part that is damaged is taken from the other node that has it. Where the disk takes nothing the copies stay.

    prune_then: once there is one more checkpoint. at: says what is being done.

    Raises:
        SupersededError: where a newer start has the run.
    """
    if place.local_rank:
        return ""
    node = place.rank // (place.world // len(place.nodes))
    if place.rank == 0:
        store.set("memory/start", str(_last_start(run)))
    start = int(store.get("memory/start"))
    parts = parts_in(folder, start) if start else {}
    needed = {step: next(iter(ranks.values()))["needed"] for step, ranks in parts.items()}
    store.set(f"memory/of/{node}", json.dumps({step: [needed[step], sorted(ranks)] for step, ranks in parts.items()}))
    bad: set[tuple[int, int, int]] = set()
    told, newest, words = [], 0, ""
    if place.rank == 0:
        told = [json.loads(store.get(f"memory/of/{other}")) for other in range(len(place.nodes))]
        newest = max((checkpoint.step for checkpoint in run.checkpoints()), default=0)
    for attempt in range(1 << 20):
        if place.rank == 0:
            step, who = _plan(told, newest, bad)
            store.set(f"memory/plan/{attempt}", json.dumps([step, who]))
        step, who = json.loads(store.get(f"memory/plan/{attempt}"))
        mine = [int(rank) for rank, other in who.items() if other == node]
        if mine:
            report = _write(run, folder / f"{start:05d}", parts[step], mine, step, at)
            store.set(f"memory/written/{attempt}/{node}", json.dumps(report))
        if place.rank == 0:
            over, words = True, words
            if who:
                reports = {n: json.loads(store.get(f"memory/written/{attempt}/{n}")) for n in sorted(set(who.values()))}
                lost = {(step, rank, n) for n, report in reports.items() for rank in report["bad"]}
                bad |= lost
                over = not lost
                if over:
                    words = _published(run, list(reports.values()), step, prune_then)
                    if not words:
                        names = ", ".join(place.nodes[n] for n in reports)
                        words = f"going on from step {step}, which start {start} has left in the memory of {names}"
            elif any(told):
                old = [int(step) for each in told for step in each]
                if max(old) > newest:
                    words = f"the nodes' memory has no whole copy of a newer step: {_INSTEAD}"
            if over and bad:
                which = ", ".join(f"step {s}, rank {r} on {place.nodes[n]}" for s, r, n in sorted(bad))
                words += f" (damaged there: {which})"
            # Of no use any more, unless the disk did not take it.
            store.set(f"memory/over/{attempt}", json.dumps([over, over and "cannot be written" not in words]))
        over, remove = json.loads(store.get(f"memory/over/{attempt}"))
        if over:
            if remove and is_own(folder):
                for left in folder.glob("[0-9]*"):
                    shutil.rmtree(left, ignore_errors=True)
            return words
    raise AssertionError("each turn leaves fewer parts")


def _last_start(run: Run) -> int:
    """The one that has made the last step; 0 without."""
    for number in reversed(starts.numbers(run.starts_dir)):
        with suppress(OSError):
            if number < run.start and starts.read_progress(run.starts_dir, number):
                return number
    return 0


def _plan(
    told: list[dict[str, tuple[list[int], list[int]]]], newest: int, bad: set[tuple[int, int, int]]
) -> tuple[int, dict[int, int]]:
    """The newest step of which every part that is needed is somewhere, and of each rank the node that is to write it.

    The node with the least to write so far; (0, {}) without such a step.
    """
    for step in sorted({int(step) for node in told for step in node if int(step) > newest}, reverse=True):
        holders: dict[int, list[int]] = {}
        needed: list[int] = []
        for number, node in enumerate(told):
            needed, ranks = node.get(str(step), (needed, []))
            for rank in ranks:
                if (step, rank, number) not in bad:
                    holders.setdefault(rank, []).append(number)
        if needed and all(holders.get(rank) for rank in needed):
            load = [0] * len(told)
            who = {}
            for rank in needed:
                who[rank] = min(holders[rank], key=load.__getitem__)
                load[who[rank]] += 1
            return step, who
    return 0, {}


def _write(
    run: Run, folder: Path, parts: dict[int, dict[str, Any]], ranks: list[int], step: int, at: Callable[[str], None]
) -> dict[str, Any]:
    """Write parts to the run's folder: which are damaged, or why the folder takes nothing."""
    memory, folder_there = folder / f"step-{step:08d}.ckpt", partial_path(run.checkpoints_dir, step, run.start)
    report: dict[str, Any] = {"bad": [], "files": {}, "position": parts[ranks[0]]["position"], "disk": ""}
    for rank in ranks:
        for name, facts in parts[rank]["files"].items():
            run.check_start()
            at(f"writing {name} of step {step} from memory")
            report["disk"] = _often(partial(_copied, memory / name, folder_there / name, facts))
            if report["disk"] == _DAMAGED:
                report["bad"].append(rank)
                report["disk"] = ""
                break
            if report["disk"]:
                return report
            report["files"][name] = facts
    return report


_DAMAGED = "damaged"


def _copied(source: Path, target: Path, facts: dict[str, Any]) -> str:
    """Copy a file through to the disk; "damaged" where it is not what its note says."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb", buffering=0) as file:
        try:
            opened = source.open("rb", buffering=0)
        except OSError:
            return _DAMAGED
        with opened:
            while True:
                try:
                    block = memoryview(opened.read(_BLOCK))
                except OSError:
                    return _DAMAGED
                if not len(block):
                    break
                digest.update(block)
                size += len(block)
                while len(block):
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return "" if (size, digest.hexdigest()) == (facts["size"], facts["sha256"]) else _DAMAGED


def _often(work: Callable[[], str]) -> str:
    """What it gives, or why it cannot be done, after some tries."""
    for left in reversed(range(_TRIES)):
        try:
            return work()
        except OSError as error:
            why = f"{error.filename or ''} {said(error)}".strip()
            if left:
                time.sleep(_PAUSE_SECONDS)
    return why


def _published(run: Run, reports: list[dict[str, Any]], step: int, prune_then: Callable[[], None]) -> str:
    """Why not; empty if it is."""
    position = reports[0]["position"]
    position = TrainingPosition(**{**position, "unlogged": tuple(position["unlogged"])})
    files = {name: facts for report in reports for name, facts in report["files"].items()}

    def named() -> str:
        publish(run.checkpoints_dir, position, files, run.start, run.check_start, recalled=True)
        return ""

    problem = next((report["disk"] for report in reports if report["disk"]), "") or _often(named)
    if problem:
        shutil.rmtree(partial_path(run.checkpoints_dir, step, run.start), ignore_errors=True)
        return (
            f"the copy of step {step} in memory cannot be written to the disk now ({problem}), and is kept: {_INSTEAD}"
        )
    with suppress(OSError):  # the job's script goes by it: a start's first step
        starts.path_of(run.starts_dir, run.start, "recalled").write_text(f"{step}\n")
    prune_then()
    return ""
