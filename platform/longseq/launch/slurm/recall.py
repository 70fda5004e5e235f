"""What the start before has left in the nodes' memory becomes a checkpoint: see longseq.training.memory_copies."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from longseq.launch.slurm.place import Place
from longseq.runs import starts
from longseq.runs.checkpoint import TrainingPosition, partial_path, publish
from longseq.runs.run import Run
from longseq.training.memory_copies import parts_in
from longseq.training.shards import write

_INSTEAD = "going on from the newest checkpoint on the disk"


def recall(run: Run, place: Place, store: Store, folder: Path) -> str:
    """Every process calls it, before anything is read of the run. On rank 0: a sentence that says what came of it.

    Only copies of the start that has made the last step count, and only newer ones than all checkpoints on the disk.
    One process of each node writes those parts that it is asked for; rank 0 gives the checkpoint its name.

    Raises:
        SupersededError: where a newer start has the run.
    """
    if place.local_rank:
        return ""
    each = place.world // len(place.nodes)
    node = place.rank // each
    before = [n for n in starts.numbers(run.starts_dir) if n < run.start and starts.read_progress(run.starts_dir, n)]
    parts = parts_in(folder, before[-1]) if before else {}
    world = next((note["position"]["world_size"] for ranks in parts.values() for note in ranks.values()), 0)
    store.set(f"memory/of/{node}", json.dumps([world, {step: sorted(ranks) for step, ranks in parts.items()}]))
    said = ""
    if place.rank == 0:
        told = [json.loads(store.get(f"memory/of/{other}")) for other in range(len(place.nodes))]
        newest = max((checkpoint.step for checkpoint in run.checkpoints()), default=0)
        step, who, said = _plan([steps for _, steps in told], newest, max(world for world, _ in told))
        store.set("memory/plan", json.dumps([step, who]))
    step, who = json.loads(store.get("memory/plan"))
    mine = [int(rank) for rank, other in who.items() if other == node]
    if mine:
        written = _write(run, folder / f"{before[-1]:05d}", parts[step], mine, step)
        store.set(f"memory/written/{node}", json.dumps(written))
    if place.rank == 0:
        if who:
            said = _published(run, store, sorted(set(who.values())), step, place, before[-1])
        store.set("memory/over", "")
    store.get("memory/over")
    shutil.rmtree(folder, ignore_errors=True)  # of older starts, all of it
    return said


def _plan(holds: list[dict[str, list[int]]], newest: int, world: int) -> tuple[int, dict[int, int], str]:
    """The newest step of which every rank's part is somewhere: the step, and of each rank the node that has it."""
    steps = sorted({int(step) for node in holds for step in node if int(step) > newest}, reverse=True)
    lost: list[int] = []
    for step in steps:
        who = {rank: number for number, node in enumerate(holds) for rank in node.get(str(step), [])}
        if world and who.keys() >= set(range(world)):
            return step, who, ""
        lost = lost or sorted(set(range(world)) - who.keys())
    if not steps:
        return 0, {}, ""
    ranks = ", ".join(map(str, lost)) or "unknown"
    return 0, {}, f"the nodes' memory has no whole copy of a step (both of rank {ranks} are lost): {_INSTEAD}"


def _write(run: Run, folder: Path, parts: dict[int, dict[str, Any]], ranks: list[int], step: int) -> dict[str, Any]:
    """Write parts to the run's folder: their files with their sums, or why that cannot be."""
    files: dict[str, Any] = {}
    memory, partial = folder / f"step-{step:08d}.ckpt", partial_path(run.checkpoints_dir, step, run.start)
    try:
        for rank in ranks:
            for name, facts in parts[rank]["files"].items():
                run.check_start()
                files[name] = asdict(write(partial / name, (memory / name).read_bytes()))
                if files[name] != facts:
                    return {"error": f"{memory / name} does not match its checksum"}
    except OSError as error:
        return {"error": f"{error.filename or partial}: {error.strerror}"}
    return {"position": parts[ranks[0]]["position"], "files": files}


def _published(run: Run, store: Store, nodes: list[int], step: int, place: Place, start: int) -> str:
    told = [json.loads(store.get(f"memory/written/{node}")) for node in nodes]
    each = place.world // len(place.nodes)
    names = ", ".join(place.node_of(node * each) for node in nodes)
    for report in told:
        if "error" in report:
            with suppress(OSError):
                shutil.rmtree(partial_path(run.checkpoints_dir, step, run.start))
            return f"the copy of step {step} cannot be used ({report['error']}): {_INSTEAD}"
    position = told[0]["position"]
    position = TrainingPosition(**{**position, "unlogged": tuple(position["unlogged"])})
    files = {name: facts for report in told for name, facts in report["files"].items()}
    publish(run.checkpoints_dir, position, files, run.start, run.check_start)
    return f"going on from step {step}, which start {start} has left in the memory of {names}"
