"""What it costs a step that a training is watched, and its state copied: ``longseq bench watching``.

Two processes that count as two nodes train with gloo as the ranks of a job do, each with its guard. What is added to a
step is timed where it is added, in the training's thread, so that a machine with other work says the same; and what
other threads and processes do for it is counted in CPU time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longseq.benchmarks.request import WatchingRequest
from longseq.benchmarks.training_process import configuration, lay_out
from longseq.benchmarks.watching_rank import COPIES, HEARTBEAT, STRAGGLERS
from longseq.errors import LongseqError
from longseq.launch.local import environment_of, free_port
from longseq.runs.run import Run

GOAL = 0.01
_WARMUPS = 5


@dataclass(frozen=True)
class WatchingResults:
    """Of rank 0 and rank 1; seconds of all counted steps together."""

    ranks: Sequence[Mapping[str, Any]]

    @property
    def step(self) -> float:
        """Seconds, on the clock."""
        return max(rank["seconds"] / rank["steps"] for rank in self.ranks)

    def share(self, what: str) -> float:
        """Of a step: what the training's thread spends on it; the larger of both ranks'."""
        return max(float(rank["training_thread"].get(what, 0.0)) / rank["seconds"] for rank in self.ranks)

    def cpu_share(self, what: str) -> float:
        """Of the processes' CPU time: all that is done for it, wherever."""

        def one(rank: Mapping[str, Any]) -> float:
            own = rank["processor"]
            beside = rank["heartbeat_beside"] if what == HEARTBEAT else own.get(f"{what} beside", 0.0)
            return float((own.get(what, 0.0) + beside) / rank["cpu"])

        return max(map(one, self.ranks))


def measure(request: WatchingRequest) -> WatchingResults:
    """Train.

    Raises:
        LongseqError: if a process fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="longseq-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        lay_out(folder)
        memory = stack.enter_context(tempfile.TemporaryDirectory(prefix="longseq-bench-", dir="/dev/shm"))
        keys = (
            *(f"model.preset={request.preset}", f"data.length={request.length}"),
            *(f"data.batch_tokens={request.length * request.batch * 2}", "trainer.nodes=2", "trainer.devices=1"),
            *("trainer.valid_every=0", "trainer.checkpoint_every=0", f"trainer.max_steps={_WARMUPS + request.steps}"),
            f"trainer.memory_checkpoint_every={request.copy_every}",
        )
        run = Run.create(configuration(folder, (*keys, *request.overrides)), default_name="watching")
        run.starts_dir.mkdir()
        port, processes = free_port(), []
        command = [sys.executable, "-m", "longseq.benchmarks.watching_rank", str(run.path), memory, str(_WARMUPS)]
        for rank in range(2):
            environment = environment_of(rank, 2, port) | {"NODE_RANK": str(rank), "LOCAL_RANK": "0"}
            output = stack.enter_context((folder / f"rank-{rank}.out").open("w+b"))
            error = stack.enter_context((folder / f"rank-{rank}.err").open("w+b"))
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=error))
            stack.callback(processes[-1].kill)
        codes = [process.wait() for process in processes]
        said = [(folder / f"rank-{rank}.err").read_text(errors="replace").strip() for rank in range(2)]
        if any(codes):
            rank = next(rank for rank, code in enumerate(codes) if code)
            raise LongseqError(f"rank {rank} of the training ended with code {codes[rank]}: {said[rank][-2000:]}")
        found = WatchingResults(json.loads((folder / "rank-0.out").read_text()))
    copies = found.ranks[0]["calls"].get(COPIES, 0)
    if copies < request.steps // request.copy_every // 2:  # one that takes too long leaves others out
        raise LongseqError(f"{copies} copies were made of {request.steps // request.copy_every}: raise --copy-every")
    return found


def table(request: WatchingRequest, results: WatchingResults) -> str:
    """Each part's share of a step, and of the CPU time."""
    parts = {
        HEARTBEAT: "heartbeat and guard",
        STRAGGLERS: "straggler statistics",
        COPIES: f"a copy in memory every {request.copy_every} steps",
    }
    rows = [f"{words:<36}{results.share(what):>10.3%}{results.cpu_share(what):>12.3%}" for what, words in parts.items()]
    both = (sum(map(results.share, parts)), sum(map(results.cpu_share, parts)))
    return "\n".join(
        [
            f"longseq bench watching: {request.preset}, 2 processes × {request.batch} × {request.length} tokens"
            + "".join(f", {override}" for override in request.overrides),
            f"{request.steps} steps of {results.step * 1e3:,.1f} ms",
            "",
            f"{'':<36}{'of a step':>10}{'of the CPU':>12}",
            *rows,
            f"{'together':<36}{both[0]:>10.3%}{both[1]:>12.3%}",
            "",
            f"Goal: at most {GOAL:.0%} of a step. Copies go on next to the training, on a free core if there is one.",
        ]
    )


def numbers(request: WatchingRequest, results: WatchingResults) -> dict[str, object]:
    """Everything that was measured, for the JSON file."""
    parts = (HEARTBEAT, STRAGGLERS, COPIES)
    return {
        "request": asdict(request),
        **asdict(results),
        "step_share": {what: results.share(what) for what in parts},
        "cpu_share": {what: results.cpu_share(what) for what in parts},
    }
