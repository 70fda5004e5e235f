"""A rank that is slower than the others, which all wait for it."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as pl

from longseq.config.schema import Config
from longseq.runs.owner import node_name
from longseq.training.callbacks.curves import Curves, WithCurves
from longseq.training.callbacks.times import Clock
from longseq.training.collectives import ControlGroup
from longseq.training.tensorboard import log_scalars
from longseq.training.vitals import Vitals

# What a rank does by itself, with no other to wait for, and what it then waits for.
OWN = {"data": "data", "forward": "its device", "write": "storage"}
_IN_A_ROW = 3  # points, before it is said
_MATTERS = 0.05  # share of the time
_PERCEPTIBLE = 0.25  # seconds between two points: what the operating system does to short steps is no matter
_STUCK_IN_STORAGE = 0.5  # share of the looks at a rank


@dataclass(frozen=True)
class Slowest:
    """The rank that needs longest for what it does by itself."""

    rank: int
    ratio: float  # to the median rank
    excess: float  # seconds above it
    cause: str  # what most of the excess is spent waiting for


def slowest(rows: Sequence[Sequence[float]]) -> Slowest:
    """Find it. rows: of each rank the seconds of each of ``OWN``, and the share of looks that found it in storage."""
    own = [sum(row[:-1]) for row in rows]
    rank = max(range(len(rows)), key=own.__getitem__)
    median = statistics.median_low(own)  # of two ranks the faster one
    usual = [statistics.median_low(column) for column in zip(*rows, strict=True)]
    cause = max(zip(OWN, rows[rank], usual, strict=False), key=lambda each: each[1] - each[2])[0]
    words = OWN["write"] if cause == "data" and rows[rank][-1] > _STUCK_IN_STORAGE else OWN[cause]
    return Slowest(rank, own[rank] / median if median else 1.0, own[rank] - median, words)


class Stragglers(WithCurves):
    """With every point of the curves: all ranks exchange three times, and the slowest is in TensorBoard.

    It is named in the log when it is ``trainer.slow_factor`` times as slow as the median for three points in a row. Its
    place is before the callback that reads ``clock`` anew. Forward passes in which ranks wait for each other (ZeRO-3,
    context parallelism) take all of them equally long: a slow device is not seen there.
    """

    def __init__(self, config: Config, curves: Curves, clock: Clock, vitals: Vitals):
        super().__init__(curves)
        self.factor, self.clock, self.vitals = config.trainer.slow_factor, clock, vitals
        self.names: list[str | None] = []
        self.found: list[tuple[int, str]] = []  # at the last points, in a row
        self.said: tuple[int, str] | None = None

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.control = ControlGroup()
        self.names = self.control.gather(f"{node_name()}: rank {trainer.global_rank} ({task.device})")

    def on_point(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if trainer.world_size == 1:
            return
        mine = [self.clock.own(name) for name in OWN]
        found = slowest(self.control.table([*mine, self.vitals.take_storage_share()]))
        points = {"slowest_rank": float(found.rank), "slowest_ratio": found.ratio}
        log_scalars(trainer, "time", points, step)
        passed = sum(self.clock.seconds[name] for name in ("data", "step", "checkpoint"))
        if trainer.is_global_zero:
            self._judge(found, self._matters(found, passed))

    def _matters(self, found: Slowest, passed: float) -> bool:
        return found.ratio >= self.factor and found.excess > max(_PERCEPTIBLE, _MATTERS * passed)

    def _judge(self, found: Slowest, slow: bool) -> None:
        self.found = [*self.found[1 - _IN_A_ROW :], (found.rank, found.cause)] if slow else []
        same = len(self.found) == _IN_A_ROW and len({rank for rank, _ in self.found}) == 1
        now = self.found[-1] if same else None
        if now and now != self.said:
            name = self.names[found.rank]
            print(
                f"longseq: warning: {name} is {found.ratio:.1f} times as slow as the others, which wait for it: most "
                f"of it is {found.cause} (trainer.slow_factor).",
                file=sys.stderr,
                flush=True,
            )
        elif self.said and not slow:
            print("longseq: all ranks are about as fast as each other again.", file=sys.stderr, flush=True)
        if now or not slow:
            self.said = now
