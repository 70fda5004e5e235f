"""One process of ``longseq bench watching``: a training of two nodes, with a watch on what watches it.

``python -m longseq.benchmarks.watching_rank RUN FOLDER WARMUPS`` in the environment of a rank. Rank 0 prints what both
measured. FOLDER: where this node's copies are kept, a folder for each rank.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from longseq.launch.slurm.guard import fork_guard
from longseq.launch.slurm.place import Place
from longseq.launch.watchdog import Ward
from longseq.runs.run import Run
from longseq.training.vitals import Vitals

HEARTBEAT, STRAGGLERS, COPIES = "heartbeat", "stragglers", "copies"


def main() -> None:
    run, rank = Run(Path(sys.argv[1]), 1), int(os.environ["RANK"])
    place = Place(rank, 0, 2, ("node1", "node2"), "127.0.0.1", int(os.environ["MASTER_PORT"]))
    ward, _ = fork_guard(rank, lambda: (run, place))  # before any thread
    guard = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]

    import torch.distributed as dist

    from longseq.allocator import keep_freed_memory
    from longseq.training import memory_copies
    from longseq.training.callbacks.checkpointing import Checkpointing
    from longseq.training.callbacks.stopping import StopFlag
    from longseq.training.callbacks.stragglers import Stragglers
    from longseq.training.fit import build_trainer, training_data
    from longseq.training.task import LanguageModelling
    from longseq.training.worker import quiet

    quiet()
    keep_freed_memory()
    spent = Spent(guard)
    vitals = spent.vitals(ward)
    config = run.config()
    os.environ[memory_copies.FOLDER] = str(Path(sys.argv[2]) / f"node-{rank}")
    spent.of(Stragglers, "on_point", STRAGGLERS)
    spent.of(Checkpointing, "_copy", COPIES)
    spent.of(memory_copies.MemoryCopies, "_copy", f"{COPIES} beside")
    trainer = build_trainer(run, config, StopFlag(), None, vitals)
    trainer.callbacks.append(_Window(spent, int(sys.argv[3])))  # type: ignore[attr-defined]
    trainer.fit(LanguageModelling(config), training_data(config, None))
    everyone: list[dict[str, Any] | None] = [None] * 2
    dist.all_gather_object(everyone, spent.found)
    if rank == 0:
        print(json.dumps(everyone))
    sys.stdout.flush()
    os._exit(0)  # the guard ends with its rank; nothing is left to be saved


class Spent:
    """Seconds on the clock and of the processor that calls take, by what they are for."""

    def __init__(self, guard: str):
        self.guard = guard
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.found: dict[str, Any] = {}

    def timed(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[what] += time.perf_counter() - began
                self.cpu[what] += time.thread_time() - cpu
                self.calls[what] += 1

        return timed

    def of(self, kind: type, name: str, what: str) -> None:
        setattr(kind, name, self.timed(getattr(kind, name), what))

    def vitals(self, ward: Ward) -> Vitals:
        vitals = Vitals(ward.theirs)
        for name in ("at", "begin_batch", "end_batch"):
            setattr(vitals, name, self.timed(getattr(vitals, name), HEARTBEAT))
        return vitals

    def begin(self) -> None:
        for sums in (self.seconds, self.cpu, self.calls):
            sums.clear()
        self.began, self.cpu_began, self.beside = time.perf_counter(), time.process_time(), self._beside()

    def end(self, steps: int) -> None:
        self.found = {
            "steps": steps,
            "seconds": time.perf_counter() - self.began,
            "cpu": time.process_time() - self.cpu_began,
            "training_thread": dict(self.seconds),
            "processor": dict(self.cpu),
            "calls": dict(self.calls),
            "heartbeat_beside": self._beside() - self.beside,
        }

    def _beside(self) -> float:
        """Seconds of the processor that the thread of the signs and the guard have taken."""
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "vitals"]
        return sum(_cpu(Path(place)) for place in (f"/proc/self/task/{thread.native_id}", f"/proc/{self.guard}"))


def _cpu(process: Path) -> float:
    fields = (process / "schedstat").read_text().split()  # nanoseconds, where clock ticks would be too coarse
    return int(fields[0]) / 1e9


class _Window(pl.Callback):
    """Counts from the first step after the warm-up on, to the last."""

    def __init__(self, spent: Spent, warmups: int):
        self.spent, self.warmups = spent, warmups

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.warmups:
            self.spent.begin()
        elif trainer.global_step == trainer.max_steps:
            self.spent.end(trainer.global_step - self.warmups)


if __name__ == "__main__":
    main()
