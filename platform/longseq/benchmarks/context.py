"""``longseq bench context``: a sequence on one process and in slices on several; measured, and as the model has it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import IO, TYPE_CHECKING

from longseq.benchmarks.context_model import NODE, Cluster, Link, predict, state_bytes, step_flops
from longseq.benchmarks.request import ContextSizes
from longseq.errors import LongseqError
from longseq.launch.local import environment_of, free_port
from longseq.models.presets import PRESETS
from longseq.models.spec import PerformerSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEVICES = (8, 16, 32, 64, 128, 256, 512)
_ASSUMPTIONS = (
    "model: compute / P + one more pass over keys and queries for their states + 2 gathers per layer (3 where slices",
    "       are longer than a tile) of one state to P − 1 others + a ring all-reduce of fp32 gradients; nothing",
    "       overlaps, the slowest link counts, matrix products alone count (benchmarks/context_model.py)",
)


@dataclass(frozen=True, kw_only=True)
class ContextRequest(ContextSizes):
    """What is measured, and the GPUs that it is extrapolated to."""

    gpu: Cluster

    @property
    def spec(self) -> PerformerSpec:
        return PerformerSpec(
            vocabulary=self.vocabulary,
            causal=True,
            features=self.features,
            window=self.window,
            sequence_tile=self.tile,
            **PRESETS[self.preset].sizes,
        )


@dataclass(frozen=True)
class Cell:
    """One length on one number of processes."""

    length: int
    processes: int
    seconds: list[float]  # of each round, on the clock
    cpu: float  # seconds of a step, all processes together
    memory: int  # the largest resident set of a process, bytes
    gathers: float  # of states, a layer and step
    gathered: float  # bytes of one, a layer and rank
    halo: float  # bytes per layer, rank and step of keys and values at the borders
    loss: float  # nats per token, of the last round
    latency: float  # seconds of a message; 0 for one process
    bandwidth: float  # bytes per second between processes; 0 for one

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure(request: ContextRequest, found: Callable[[Cell], None]) -> None:
    """Measure every cell, each in processes of its own, and hand it over.

    Raises:
        LongseqError: for a length that does not divide, or a process that failed.
    """
    for length in request.lengths:
        for processes in request.processes:
            if length % processes:
                raise LongseqError(f"--lengths {length}: {processes} processes do not share it evenly.")
    for length in request.lengths:
        for processes in request.processes:
            found(_cell(request, length, processes))


def calibrated(cells: Sequence[Cell], spec: PerformerSpec, batch: int) -> Cluster:
    """This machine's constants: FLOP/s from one process at the longest length, the link from the most processes.

    Raises:
        LongseqError: without a measurement of one process.
    """
    alone = [cell for cell in cells if cell.processes == 1]
    if not alone:
        raise LongseqError("--processes: measure 1 process too, which the model takes its FLOP/s from.")
    longest = max(alone, key=lambda cell: cell.length)
    flops = batch * longest.length * step_flops(spec, longest.length, longest.length) / longest.median
    widest = max(cells, key=lambda cell: (cell.processes, cell.length))
    link = Link(widest.bandwidth, widest.latency)
    return Cluster(flops, link, link)


def table(request: ContextRequest, cells: Sequence[Cell]) -> str:
    """What was measured next to what the model says, and what it says of GPUs."""
    spec = request.spec
    here = calibrated(cells, spec, request.batch)
    lines = [
        f"longseq bench context: {request.preset} ({spec.depth} layers, width {spec.dim}, {spec.heads} heads, "
        f"{spec.features} features{f', window {spec.window}' if spec.window else ''}), batch {request.batch}, tiles of "
        f"{request.tile:,}; {request.dtype}, {request.threads} thread(s) a process",
        f"one gather: {state_bytes(spec, request.batch):,} bytes per layer and rank = B·H·(m·(e+1)+1)·4",
        "",
        f"{'length':>10}{'P':>4}{'seconds':>10}{'model':>10}{'ratio':>7}{'ms/token':>10}{'CPU ms':>9}{'speedup':>9}"
        f"{'memory':>11}{'gathers':>9}{'bytes each':>12}{'halo bytes':>12}",
    ]
    for cell in cells:
        wanted = predict(spec, here, cell.length, cell.processes, request.batch).seconds
        alone = next((c for c in cells if c.length == cell.length and c.processes == 1), None)
        tokens = cell.length * request.batch
        lines.append(
            f"{cell.length:>10,}{cell.processes:>4}{cell.median:>10.2f}{wanted:>10.2f}{wanted / cell.median:>7.2f}"
            f"{1e3 * cell.median / tokens:>10.3f}{1e3 * cell.cpu / tokens:>9.3f}"
            f"{f'{alone.median / cell.median:.2f}×' if alone else '–':>9}{cell.memory / 2**30:>7.2f} GiB"
            f"{cell.gathers:>9.0f}{cell.gathered:>12,.0f}{cell.halo:>12,.0f}"
        )
    lines += ["", _constants("this machine", here), _constants("GPUs (given)", request.gpu), *_ASSUMPTIONS, ""]
    lines += [
        f"extrapolated: {request.gpu_length:,} tokens in slices (strong), {request.gpu_slice:,} tokens a device (weak)",
        f"{'devices':>8}{'seconds':>11}{'tokens/s':>15}{'efficiency':>12}{'states':>9}{'gradient':>10}"
        f"{'weak: tokens':>15}{'seconds':>11}{'efficiency':>12}",
    ]
    for row in extrapolation(request):
        rate = request.gpu_length / row.strong
        lines.append(
            f"{row.devices:>8}{row.strong:>11.4f}{rate:>15,.0f}{row.strong_efficiency:>12.1%}"
            f"{row.states:>9.1%}{row.gradient:>10.1%}{row.tokens:>15,}{row.weak:>11.4f}{row.weak_efficiency:>12.1%}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Extrapolated:
    """What the model says of so many GPUs."""

    devices: int
    strong: float  # seconds per step
    strong_efficiency: float  # of one device's rate
    states: float  # shares of the strong step
    gradient: float
    tokens: int  # of the weak step
    weak: float
    weak_efficiency: float


def extrapolation(request: ContextRequest) -> list[Extrapolated]:
    """Strong and weak scaling on the given GPUs."""
    spec, gpu, rows = request.spec, request.gpu, []
    for devices in DEVICES:
        strong = predict(spec, gpu, request.gpu_length, devices)
        weak = predict(spec, gpu, request.gpu_slice * devices, devices)
        alone = predict(spec, gpu, request.gpu_length, 1).seconds
        rows.append(
            Extrapolated(
                devices,
                strong.seconds,
                alone / devices / strong.seconds,
                strong.states / strong.seconds,
                strong.gradient / strong.seconds,
                request.gpu_slice * devices,
                weak.seconds,
                predict(spec, gpu, request.gpu_slice, 1).seconds / weak.seconds,
            )
        )
    return rows


def numbers(request: ContextRequest, cells: Sequence[Cell]) -> dict[str, object]:
    """Everything, for the JSON file."""
    spec = request.spec
    here = calibrated(cells, spec, request.batch)
    return {
        "request": asdict(request),
        "spec": asdict(spec),
        "state_bytes": state_bytes(spec, request.batch),
        "this_machine": asdict(here),
        "cells": [
            {**asdict(cell), "model": asdict(predict(spec, here, cell.length, cell.processes, request.batch))}
            for cell in cells
        ],
        "extrapolation": [asdict(row) for row in extrapolation(request)],
    }


def figure(request: ContextRequest, cells: Sequence[Cell]) -> Figure:
    """Measured strong and weak scaling next to the model, and what it extrapolates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spec = request.spec
    here = calibrated(cells, spec, request.batch)
    drawing = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(drawing)
    strong, weak, far = drawing.subplots(1, 3)
    for length in request.lengths:
        row = [cell for cell in cells if cell.length == length]
        (line,) = strong.plot([c.processes for c in row], [c.median for c in row], "o-", label=f"{length:,} tokens")
        modelled = [predict(spec, here, length, c.processes, request.batch).seconds for c in row]
        strong.plot([c.processes for c in row], modelled, ":", color=line.get_color())
    for share in sorted({cell.length // cell.processes for cell in cells}):
        row = [cell for cell in cells if cell.length // cell.processes == share]
        if len(row) > 1:
            (line,) = weak.plot([c.processes for c in row], [c.median for c in row], "o-", label=f"{share:,} each")
            modelled = [predict(spec, here, c.length, c.processes, request.batch).seconds for c in row]
            weak.plot([c.processes for c in row], modelled, ":", color=line.get_color())
    rows = extrapolation(request)
    devices = [row.devices for row in rows]
    far.plot(devices, [row.strong_efficiency for row in rows], "o-", label=f"{request.gpu_length:,} tokens")
    far.plot(devices, [row.weak_efficiency for row in rows], "s-", label=f"{request.gpu_slice:,} a GPU")
    for axes, title in ((strong, "strong scaling, measured (dotted: model)"), (weak, "weak scaling, measured")):
        axes.set(title=title, xlabel="processes", ylabel="seconds per step", xticks=request.processes, ylim=(0, None))
    far.set(title=f"model: {request.preset} on GPUs", xlabel="GPUs", ylabel="efficiency", xscale="log", ylim=(0, 1.05))
    far.set_xticks(devices, [str(n) for n in devices])
    far.minorticks_off()
    for axes in (strong, weak, far):
        axes.grid(True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return drawing


def _cell(request: ContextRequest, length: int, processes: int) -> Cell:
    asked = json.dumps(
        {
            "spec": asdict(request.spec),
            "length": length,
            **{name: getattr(request, name) for name in ("batch", "dtype", "threads", "rounds", "warmups")},
        }
    )
    port = free_port()
    command = [sys.executable, "-m", "longseq.benchmarks.context_rank", asked]
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        # Files and not pipes: one that is full and that nobody reads yet would stop its process, and so all of them.
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in range(processes)]
        for rank, (out, err) in enumerate(files):
            environment = environment_of(rank, processes, port) | {"OMP_NUM_THREADS": str(request.threads)}
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
            stack.callback(running[-1].kill)
        for process in running:
            process.wait()
        ended = [[_content(file) for file in both] for both in files]
    # One that was killed first (its code is negative): the others can only say that they have lost it.
    for process, (_, errors) in sorted(zip(running, ended, strict=True), key=lambda pair: pair[0].returncode):
        if process.returncode:
            last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}, out of memory perhaps"]
            raise LongseqError(f"a process for {length:,} tokens on {processes} failed: {last[0]}.")
    found = json.loads(ended[0][0].splitlines()[-1])
    ranks = found["ranks"]
    return Cell(
        length=length,
        processes=processes,
        seconds=[max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)],
        cpu=sum(rank["cpu"] for rank in ranks),
        memory=max(rank["memory"] for rank in ranks),
        gathers=max(rank["gathers"] for rank in ranks),
        gathered=max(rank["gathered"] for rank in ranks),
        halo=max(rank["halo"] for rank in ranks),
        loss=sum(rank["loss"] for rank in ranks) / length / request.batch,
        latency=found["latency"],
        bandwidth=found["bandwidth"],
    )


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _constants(name: str, cluster: Cluster) -> str:
    def link(of: Link) -> str:
        return f"{of.bandwidth / 1e9:,.2f} GB/s and {of.latency * 1e6:,.0f} µs a message"

    if not cluster.inside.bandwidth:
        return f"{name}: {cluster.flops / 1e9:,.1f} GFLOP/s per process; no link, as no two processes were measured"
    between = "" if cluster.between == cluster.inside else f"; {link(cluster.between)} beyond {NODE} devices"
    return f"{name}: {cluster.flops / 1e9:,.1f} GFLOP/s per process; {link(cluster.inside)}{between}"
