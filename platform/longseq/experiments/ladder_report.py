"""A ladder for people: a table in Markdown, and a picture."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

from longseq.experiments.ladder import Ladder, Rung
from longseq.experiments.tables import markdown


def table(found: Ladder) -> str:
    """Rungs, the law and what it predicts."""
    law = found.law
    rows = [["weights", "width", "tokens", "steps", "loss", "fit", "off"]]
    rows += [_row(rung, law.loss(rung.member.parameters, rung.tokens)) for rung in found.rungs]
    parts = ["# Ladder", markdown(rows)]
    if found.rates:
        losses = {rate: f"{loss:.4f}" if math.isfinite(loss) else "diverged" for rate, loss in found.rates.items()}
        tried = ", ".join(f"{rate:g}: {loss}" for rate, loss in losses.items())
        parts.append(f"Learning rates at width {found.rungs[0].member.dim}: {tried}.")
    data = f" + {law.data:.4g} / D^{law.data_exponent:.3f}" if law.data else ", at these tokens per weight"
    parts.append(f"loss(N, D) = {law.irreducible:.4f} + {law.size:.4g} / N^{law.size_exponent:.3f}{data}")
    said = found.prediction
    interval = "too few rungs for an interval"
    if said.low is not None and said.high is not None:
        interval = f"95 %: {said.low:.4f} to {said.high:.4f}"
    parts.append(
        f"{said.parameters:,} weights, {said.tokens:,} tokens, optim.lr={found.lr:g} optim.base_dim={found.base_dim}: "
        f"loss {said.loss:.4f} ({interval})"
    )
    if found.measured:
        parts.append(
            f"Trained: {found.measured.loss:.4f}; the prediction is off by {said.loss / found.measured.loss - 1:+.2%}."
        )
    return "\n\n".join(parts) + "\n"


def _row(rung: Rung, fitted: float) -> list[str]:
    loss = f"{rung.loss:.4f}" + (f" ± {rung.spread:.4f}" if len(rung.runs) > 1 else "")
    sizes = (f"{rung.member.parameters:,}", str(rung.member.dim), f"{rung.tokens:,}", f"{rung.steps:,}")
    return [*sizes, loss, f"{fitted:.4f}", f"{fitted / rung.loss - 1:+.2%}"]


def draw(found: Ladder) -> Path | None:
    """ladder.png in its folder: losses against weights, a line a budget; None: matplotlib is not there."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, said = figure.subplots(), found.prediction
    budgets = sorted({rung.budget for rung in found.rungs})
    sizes = sorted({rung.member.parameters for rung in found.rungs} | {said.parameters})
    for number, budget in enumerate(budgets):
        rungs = [rung for rung in found.rungs if rung.budget == budget]
        colour = f"C{number}"
        axes.plot([r.member.parameters for r in rungs], [r.loss for r in rungs], "o", color=colour)
        fitted = [found.law.loss(size, budget * size) for size in sizes]
        axes.plot(sizes, fitted, "-", color=colour, label=f"{budget:g} tokens per weight")
    low, high = (said.loss if bound is None else bound for bound in (said.low, said.high))
    bars = [[max(0.0, said.loss - low)], [max(0.0, high - said.loss)]]
    axes.errorbar([said.parameters], [said.loss], yerr=bars, fmt="s", color="black", capsize=4, label="predicted")
    if found.measured:
        axes.plot([said.parameters], [found.measured.loss], "x", color="red", markersize=9, label="trained")
    axes.set(xscale="log", xlabel="weights", ylabel="validation loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path = found.folder / "ladder.png"
    figure.savefig(path)
    return path
