"""Time and memory against the length, one row of panels a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longseq.benchmarks.request import OURS, Request
from longseq.benchmarks.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour a contender in every picture: Okabe and Ito's, which colour-blind readers tell apart.
_COLOURS = {
    "favor": "#0072B2",
    "window": "#56B4E9",
    "exact": "#D55E00",
    "performer-pytorch": "#E69F00",
    "fast-transformers": "#009E73",
    "fla": "#CC79A7",
    "opt": "#777777",
}


_MEMORY = {"attention": "MiB beyond inputs, outputs and gradients", "step": "MiB beyond weights and optimiser state"}


def figure(request: Request, results: Results, title: str) -> Figure:
    """Time on the left, memory on the right, in log-log; of each direction the last work measured (the training one).

    Bands are the fastest and the slowest round; a cross marks where a contender was stopped.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = dict(results.parts())  # direction: the last of its works
    drawing = Figure(figsize=(11, 0.9 + 4 * max(1, len(last))), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(max(1, len(last)), 2, squeeze=False)
    drawing.suptitle(title)
    for (time, memory), (direction, work) in zip(panels, last.items(), strict=False):
        for name in results.contenders(direction, work):
            _draw(time, memory, results, direction, work, name)
        time.set(title=f"{direction}: time of {work}", ylabel="milliseconds")
        memory.set(title=f"{direction}: memory of {work}", ylabel=_MEMORY[results.benchmark])
        for axes in (time, memory):
            axes.set(xlabel="length (tokens)", xscale="log", yscale="log")
            _tick_lengths(axes, request.lengths)
            _tick_values(axes)
            axes.grid(True, which="major", alpha=0.3)
        time.legend(fontsize="small")
    return drawing


def _draw(time: Axes, memory: Axes, results: Results, direction: str, work: str, name: str) -> None:
    series = results.series(direction, work, name)
    stopped = any(n.contender == name and n.direction == direction and n.length for n in results.notes)
    lengths = [m.length for m in series]
    colour, line = _COLOURS.get(name, "black"), ":" if name == "opt" else "-"
    width = 2.2 if name in OURS else 1.4
    milliseconds = [m.median * 1e3 for m in series]
    label = name + " (stopped)" * stopped
    time.plot(lengths, milliseconds, line, color=colour, linewidth=width, marker="o", markersize=4, label=label)
    low, high = [min(m.seconds) * 1e3 for m in series], [max(m.seconds) * 1e3 for m in series]
    time.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    mebibytes = [m.memory / 2**20 for m in series]
    if any(mebibytes):  # nothing has no place on a logarithmic axis
        memory.plot(lengths, mebibytes, line, color=colour, linewidth=width, marker="o", markersize=4)
    if stopped:
        time.plot(lengths[-1:], milliseconds[-1:], marker="x", markersize=10, color=colour)
        memory.plot(lengths[-1:], mebibytes[-1:], marker="x", markersize=10, color=colour)


def _tick_lengths(axes: Axes, lengths: tuple[int, ...]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n}" for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _tick_values(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    if high < 200 * low:  # hardly two powers of ten
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
