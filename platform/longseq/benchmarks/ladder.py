"""Contenders measured side by side at one length after the other, each until it would take too long or too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from longseq.benchmarks.request import Request
from longseq.benchmarks.results import Measurement, Note, Results
from longseq.measure import peaks as memory
from longseq.measure.flops import Flops
from longseq.measure.timing import Gemm, repeats_for, seconds_per_call

Inputs = TypeVar("Inputs")

# A length that everything can do; from here on the approach doubles until the first length that was asked for.
FIRST_APPROACH = 256
# A call that takes less is made once more on the approach: the quicker of two is nearer to what it costs.
CHEAP_SECONDS = 1.0
# Predictions are off by some, and the rest of the machine wants to live.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Task:
    """Something to measure: a call that returns the tensors it was to make, and the FLOPs it needs."""

    call: memory.Call
    flops: Flops | None = None


class Progress(Protocol):
    """What is told to a person who waits."""

    def now(self, text: str) -> None:
        """What is being done."""

    def line(self, text: str) -> None:
        """What was found."""


@dataclass(frozen=True)
class _Point:
    length: int
    seconds: float
    peak: float


@dataclass
class Ladder(Generic[Inputs]):
    """One direction of a benchmark.

    Attributes:
        contenders: by name, the tasks (by name) on inputs that all share.
        rounds: how often each task is timed; the contenders take turns, and so does their order.
        seconds: limit of what warming up and the rounds of one contender may take at one length.
    """

    direction: str
    make_inputs: Callable[[int], Inputs]
    contenders: Mapping[str, Callable[[Inputs], Mapping[str, Task]]]
    rounds: int
    seconds: float
    device: torch.device
    gemm: Gemm
    results: Results
    progress: Progress

    def climb(self, lengths: Sequence[int]) -> None:
        """Measure all lengths; what was measured is in ``results`` as soon as a length is done."""
        if not self.contenders:
            return
        self._known: dict[str, dict[str, list[_Point]]] = {name: {} for name in self.contenders}
        self.gemm.measure()
        for length in sorted(lengths):
            for name in list(self._known):
                self._approach(name, length)
            self._measure(length)
        self.gemm.measure()

    def _approach(self, name: str, target: int) -> None:
        """Look at shorter lengths, so that a prediction has two points and no more than a factor 2 to go."""
        while name in self._known and (length := self._next_approach(name, target)) is not None:
            self.progress.now(f"{self.direction} {length:,}: a first look at {name}")
            self._prepare(name, length, self.make_inputs(length))

    def _next_approach(self, name: str, target: int) -> int | None:
        known = max((points[-1].length for points in self._known[name].values()), default=FIRST_APPROACH // 2)
        return 2 * known if 2 * known < target else None

    def _measure(self, length: int) -> None:
        inputs, ready, memories = self.make_inputs(length), {}, {}
        for name in list(self._known):
            self.progress.now(f"{self.direction} {length:,}: memory of {name}")
            prepared = self._prepare(name, length, inputs)
            if prepared:
                ready[name], memories[name] = prepared
        calls = [(name, work) for name, tasks in ready.items() for work in tasks]
        repeats = {(name, work): repeats_for(self._known[name][work][-1].seconds) for name, work in calls}
        times: dict[tuple[str, str], list[float]] = {call: [] for call in calls}
        for turn in range(self.rounds):
            start = turn * len(calls) // self.rounds
            for name, work in calls[start:] + calls[:start]:
                self.progress.now(f"{self.direction} {length:,}: round {turn + 1} of {self.rounds}, {name}")
                call = ready[name][work].call
                times[name, work].append(seconds_per_call(call, self.device, repeats[name, work]))
            self.gemm.measure()
        said = []
        for name, work in calls:
            found = Measurement(
                self.direction,
                work,
                name,
                length,
                tuple(times[name, work]),
                memories[name][work],
                ready[name][work].flops,
            )
            point = self._known[name][work][-1]
            # A busy machine only ever adds: the quickest round predicts best.
            self._known[name][work][-1] = _Point(length, min(found.seconds), point.peak)
            self.results.measurements.append(found)
            if work == list(ready[name])[-1]:
                said.append(f"{name} {found.median * 1e3:,.4g} ms")
        if said:
            work = list(next(iter(ready.values())))[-1]
            self.progress.line(f"{self.direction}, {length:,} tokens, {work}: {', '.join(said)}")

    def _prepare(self, name: str, length: int, inputs: Inputs) -> tuple[Mapping[str, Task], dict[str, int]] | None:
        """Warm a contender up at a length and take its memory; None, with a note, if it has to stop before."""
        problem = self._too_much(name, length)
        if problem:
            self._stop(name, length, f"stopped: {problem}")
            return None
        points, memories = {}, {}
        try:
            tasks = self.contenders[name](inputs)
            for work, task in tasks.items():
                task.call()
                seconds = seconds_per_call(task.call, self.device)
                if seconds < CHEAP_SECONDS:
                    seconds = min(seconds, seconds_per_call(task.call, self.device))
                peak, returned = memory.peak(task.call, self.device)
                memories[work] = max(0, peak - returned)
                points[work] = _Point(length, seconds, peak)
        except Exception as error:  # another library's, or ours: the other contenders are still worth their time
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._stop(name, length, f"failed: {first[:160]}")
            return None
        for work, point in points.items():
            self._known[name].setdefault(work, []).append(point)
        return tasks, memories

    def _stop(self, name: str, length: int, text: str) -> None:
        del self._known[name]
        self.results.notes.append(Note(name, text, self.direction, length))
        self.progress.line(f"{self.direction}, {length:,} tokens: {name} {text}")

    def _too_much(self, name: str, length: int) -> str | None:
        known = self._known[name].values()
        # Besides the rounds, two calls to warm up and one that is watched for its memory.
        calls = self.rounds + 3
        seconds = calls * sum(predict([(p.length, p.seconds) for p in points], length) for points in known)
        if seconds > self.seconds:
            return f"predicted {seconds:,.0f} s for {calls} runs, above --seconds {self.seconds:g}"
        most = max((predict([(p.length, p.peak) for p in points], length) for points in known), default=0.0)
        free = memory.available(self.device)
        if most > MEMORY_SHARE * free:
            return f"predicted {most / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free"
        return None


def climb(
    request: Request,
    make_inputs: Callable[[int], Inputs],
    contenders: Callable[[str], Mapping[str, Callable[[Inputs], Mapping[str, Task]]]],
    results: Results,
    progress: Progress,
) -> None:
    """Measure a request. contenders: those of a direction. What is in ``results`` when it is interrupted is whole."""
    device = torch.device(request.device)
    gemm = Gemm(request.gemm_size, getattr(torch, request.dtype), device, results.gemm_rates)
    how = {"rounds": request.rounds, "seconds": request.seconds, "device": device, "gemm": gemm}
    for direction in request.directions:
        to = {"contenders": contenders(direction), "results": results, "progress": progress}
        Ladder(direction=direction, make_inputs=make_inputs, **how, **to).climb(request.lengths)  # type: ignore[arg-type]


def predict(points: Sequence[tuple[int, float]], length: int) -> float:
    """A cost at ``length`` from costs at shorter ones: the last growth goes on.

    Its exponent is held between 1 and 2, the growths there are: small sizes are noisy. From one point: 2.
    """
    if not points:
        return 0.0
    last, cost = points[-1]
    exponent = 2.0
    if len(points) > 1 and min(points[-2][1], cost) > 0:
        before, earlier = points[-2]
        exponent = min(2.0, max(1.0, math.log(cost / earlier) / math.log(last / before)))
    return cost * (length / last) ** exponent
