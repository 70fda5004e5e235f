"""What a benchmark found, and what follows from it: speedups, crossovers, growth with the length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

from longseq.measure.flops import Flops


@dataclass(frozen=True)
class Measurement:
    """One contender at one length.

    Attributes:
        direction: "causal" or "bidirectional".
        work: what was timed, e.g. "forward".
        seconds: of one call, a number per round.
        memory: peak bytes beyond inputs, outputs and their gradients.
        flops: of one call, or None where they are not counted.
    """

    direction: str
    work: str
    contender: str
    length: int
    seconds: tuple[float, ...]
    memory: int
    flops: Flops | None = None

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class Note:
    """Why something was not measured, from ``length`` on; at no length if that is None."""

    contender: str
    text: str
    direction: str
    length: int | None = None


@dataclass
class Results:
    """A benchmark's measurements so far.

    Attributes:
        rows: how many rows a memory slope is shared among, and their unit: (batch · heads, "token and head").
        about: each contender's description.
        gemm_rates: FLOP/s of every sample of the matrix product.
    """

    benchmark: str
    rows: tuple[int, str]
    about: Mapping[str, str]
    formula: str | None = None
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    gemm_rates: list[float] = field(default_factory=list)
    interrupted: bool = False

    def series(self, direction: str, work: str, contender: str) -> list[Measurement]:
        """By length, rising."""
        found = [m for m in self.measurements if (m.direction, m.work, m.contender) == (direction, work, contender)]
        return sorted(found, key=lambda m: m.length)

    def parts(self) -> list[tuple[str, str]]:
        """Each direction and work that was measured."""
        return list(dict.fromkeys((m.direction, m.work) for m in self.measurements))

    def contenders(self, direction: str, work: str) -> list[str]:
        found = {m.contender for m in self.measurements if (m.direction, m.work) == (direction, work)}
        return [name for name in self.about if name in found]


@dataclass(frozen=True)
class Crossover:
    """The length from which on ours is the faster one: ``relation`` "=" it, "<" it or ">" it."""

    relation: str
    length: float


def ratios(numerator: Sequence[Measurement], denominator: Sequence[Measurement]) -> dict[int, float]:
    """Quotient of the median times at each length that both have."""
    below = {m.length: m.median for m in denominator}
    return {m.length: m.median / below[m.length] for m in numerator if m.length in below}


def crossover(speedup: Mapping[int, float]) -> Crossover | None:
    """Where the speedup by length passes 1 for the last time, on a straight line in log-log; None without lengths."""
    points = sorted(speedup.items())
    if not points:
        return None
    if points[-1][1] <= 1:
        return Crossover(">", points[-1][0])
    for (short, low), (long, high) in reversed(list(pairwise(points))):
        if low <= 1:
            share = -math.log(low) / (math.log(high) - math.log(low))
            return Crossover("=", math.exp(math.log(short) + share * math.log(long / short)))
    return Crossover("<", points[0][0])


def time_a_token(series: Sequence[Measurement], base: int = 4096) -> dict[int, float]:
    """Time per token at each length from ``base`` on, relative to the first of them: 1 everywhere if it is linear."""
    long = [m for m in series if m.length >= base]
    return {m.length: (m.median / m.length) / (long[0].median / long[0].length) for m in long}


def memory_slope(series: Sequence[Measurement], rows: int) -> float | None:
    """Bytes of peak memory by which one more token adds to each row: the least-squares line over the lengths."""
    if len(series) < 2:
        return None
    x, y = [m.length for m in series], [m.memory / rows for m in series]
    x_mean, y_mean = fmean(x), fmean(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
