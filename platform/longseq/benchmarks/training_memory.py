"""The memory estimate of ``longseq check`` and ``submit`` against two measured training steps, cell by cell."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from longseq.benchmarks.request import MemoryRequest
from longseq.benchmarks.training_process import configuration, one_process
from longseq.data import vocabulary
from longseq.devices import on_cuda
from longseq.measure.memory import MemoryEstimate, estimate, gib
from longseq.runs.run import Run
from longseq.training.rehearsal import RESULTS, rehearse

GOAL = 0.2  # how far the estimate may be off, as a share of what was measured
SINGLE = "single"  # besides the ZeRO stages


@dataclass(frozen=True)
class Cell:
    """One training."""

    preset: str
    length: int
    attention: str
    objective: str
    checkpointing: bool
    zero_stage: str

    def overrides(self, batch: int) -> tuple[str, ...]:
        strategy = "trainer.strategy=single" if self.zero_stage == SINGLE else f"trainer.zero_stage={self.zero_stage}"
        return (
            *(f"model.preset={self.preset}", f"data.length={self.length}", f"data.batch_tokens={self.length * batch}"),
            *(f"attention.kind={self.attention}", f"model.objective={self.objective}", strategy),
            f"trainer.activation_checkpointing={str(self.checkpointing).lower()}",
            *("trainer.max_steps=2", "trainer.valid_every=0", "trainer.checkpoint_every=0", "trainer.probe_every=0"),
        )


@dataclass(frozen=True)
class CellResult:
    cell: Cell
    measured: int  # bytes
    estimate: MemoryEstimate

    @property
    def ratio(self) -> float:
        """Estimate to measurement."""
        return self.estimate.peak / self.measured

    @property
    def good(self) -> bool:
        return abs(self.ratio - 1) <= GOAL


def _cells(request: MemoryRequest) -> Iterator[Cell]:
    again = [name == "yes" for name in request.checkpointing]
    of_model = request.presets, request.lengths, request.attention, request.objectives
    return itertools.starmap(Cell, itertools.product(*of_model, again, request.zero_stages))


def measure(request: MemoryRequest, found: Callable[[CellResult], None]) -> None:
    """Measure every cell, and hand each over as soon as it is known."""
    with one_process() as folder:
        for number, cell in enumerate(_cells(request)):
            name = f"run.name=cell-{number}"
            config = configuration(folder, (*cell.overrides(request.batch), name, *request.overrides))
            run = Run.create(config, default_name="cell")
            gc.collect()  # what the cell before has left must not be freed while this one counts
            # The optimiser's state is there after a short step: one at full length is enough.
            rehearse(run, config, first_length=min(64, cell.length))
            measured = json.loads((run.path / RESULTS).read_text())["peak"]
            found(CellResult(cell, measured, estimate(config, vocabulary(config).size, on_cuda=on_cuda(config))))


def row(result: CellResult) -> str:
    """One cell for people."""
    cell, needed = result.cell, result.estimate
    parts = (needed.weights, needed.gradients, needed.optimizer, needed.activations)
    return (
        f"{cell.preset:<10}{cell.length:>7,}  {cell.attention:<6}{cell.objective:<8}"
        f"{'recomputed' if cell.checkpointing else 'kept':<11}{cell.zero_stage:<7}{gib(result.measured):>11}"
        f"{gib(needed.peak):>11}{result.ratio:>7.2f}{' ' if result.good else '!'}"
        + "".join(f"{gib(part):>11}" for part in parts)
    )


HEAD = (
    f"{'preset':<10}{'length':>7}  {'kind':<6}{'':<8}{'activity':<11}{'ZeRO':<7}{'measured':>11}{'estimate':>11}"
    f"{'ratio':>7} {'weights':>11}{'gradients':>11}{'optimiser':>11}{'activations':>11}"
)


def numbers(request: MemoryRequest, results: list[CellResult]) -> dict[str, object]:
    """Everything, for the JSON file."""
    cells = [
        {**asdict(r.cell), "measured": r.measured, "estimate": asdict(r.estimate), "ratio": r.ratio} for r in results
    ]
    return {"request": asdict(request), "cells": cells}
