"""The pictures of ``longseq figures``: numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longseq.runs.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = npt.NDArray[np.floating]

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_SERIES = (BLUE, ORANGE, GREEN, PINK)
_HEADS = 8  # of an attention map's layer

# panel: the curves in it, and what it shows. Panels without curves are left out.
_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("loss (nats a target)", (("train/loss", "training"), ("valid/loss", "validation")), False),
    ("accuracy", (("train/accuracy", "training"), ("valid/accuracy", "validation")), False),
    ("learning rate", (("train/learning_rate", "learning rate"),), False),
    ("gradient norm", (("train/gradient_norm", "gradient norm"),), True),
)


def training_curves(curves: Mapping[str, Curve], evaluated: Mapping[str, Curve], title: str) -> Figure:
    """Loss, accuracy, learning rate and gradient norm against the step; ``evaluated``: of `longseq evaluate`."""
    figure, panels = _figure(2, 2, 10, 6.4, title)
    for axes, (what, lines, logarithmic) in zip(panels.flat, _PANELS, strict=True):
        for (tag, label), colour in zip(lines, _SERIES, strict=False):
            points = sorted(curves.get(tag, {}).items())
            if points:
                steps, values = zip(*points, strict=True)
                marker = "o" if label == "validation" else ""
                axes.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
        quantity = {"loss (nats a target)": "loss", "accuracy": "accuracy"}.get(what)
        for split, colour in (("test", GREEN), ("ood", PINK)):
            points = sorted(evaluated.get(f"{split}/{quantity}", {}).items()) if quantity else []
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, "D", color=colour, markersize=5, linestyle=":", label=split)
        axes.set(xlabel="step", ylabel=what)
        if logarithmic and axes.lines:
            _logarithmic(axes)
        if quantity == "accuracy":
            _percent(axes)
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
        elif len(axes.lines) > 1:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure


def accuracy_by_length(splits: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    """Accuracy and perplexity of the sequences of each bucket of lengths; rows of summary.by_length by split."""
    figure, panels = _figure(1, 2, 10, 4.2, title)
    edges = sorted({(row["from"], row["to"]) for rows in splits.values() for row in rows})
    place = {edge: number for number, edge in enumerate(edges)}
    names = [f"{low:,}–{high:,}" for low, high in edges]
    for axes, key in zip(panels.flat, ("accuracy", "perplexity"), strict=True):
        for (split, rows), colour in zip(splits.items(), _SERIES, strict=False):
            x = [place[row["from"], row["to"]] for row in rows]
            y = [row[key] for row in rows]
            # The standard error of a share; targets of one sequence are not independent, so it is a lower bound.
            error = [np.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["targets"]) for row in rows]
            bars = error if key == "accuracy" else None
            axes.errorbar(
                x, y, yerr=bars, color=colour, marker="o", markersize=5, linewidth=1.5, capsize=3, label=split
            )
        axes.set(xlabel="tokens of the sequence", ylabel=key)
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 5 else 0, fontsize="small")
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _percent(panels.flat[0])
    return figure


def attention_maps(own: Matrix | None, exact: Matrix, kernel: str, title: str) -> Figure:
    """A layer's attention (heads, queries, keys), next to softmax attention over the same queries and keys.

    Each query's weights are shown as shares of its largest: on one scale for all, a causal map is black but for the
    first queries, which have few keys. None: the layer is exact itself.
    """
    rows = [("softmax", exact)] if own is None else [(f"FAVOR+ ({kernel})", own), ("softmax", exact)]
    heads = min(_HEADS, exact.shape[0])
    figure, panels = _figure(len(rows), heads, max(4.5, 2.7 * heads + 1), 2.9 * len(rows) + 0.9, title)
    image = None
    for line, (label, maps) in enumerate(rows):
        for head in range(heads):
            axes = panels[line, head]
            weights = maps[head]
            shares = np.clip(weights / np.maximum(weights.max(-1, keepdims=True), 1e-30), 0, 1)
            image = axes.imshow(shares, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"{label}, head {head}", fontsize="small")
            axes.tick_params(labelsize="x-small")
            if head == 0:
                axes.set_ylabel("query position", fontsize="small")
            if line == len(rows) - 1:
                axes.set_xlabel("key position", fontsize="small")
    assert image is not None
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.8, aspect=30)
    bar.set_label("share of the query's largest weight", fontsize="small")
    return figure


def similarities(cosine: Matrix, blosum: Matrix, letters: str, correlation: float, title: str) -> Figure:
    """Cosine similarities of the amino acids' embeddings next to BLOSUM62, and one against the other by pairs."""
    figure, panels = _figure(1, 3, 14.5, 4.8, title)
    off = ~np.eye(len(letters), dtype=bool)
    largest = float(np.abs(cosine[off]).max())
    pictures = ((cosine, "cosine of the embeddings", largest), (blosum, "BLOSUM62", float(np.abs(blosum[off]).max())))
    for axes, (matrix, name, most) in zip(panels.flat, pictures, strict=False):
        # The diagonal, 1 or the letter's own score, would take all of the scale.
        axes.set_facecolor("#cccccc")
        image = axes.imshow(np.where(off, matrix, np.nan), cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_xticks(range(len(letters)), list(letters), fontsize="small")
        axes.set_yticks(range(len(letters)), list(letters), fontsize="small")
        axes.set_title(name, fontsize="medium")
        figure.colorbar(image, ax=axes, shrink=0.8)
    axes = panels.flat[2]
    upper = np.triu(np.ones_like(off), 1).astype(bool)
    x, y = blosum[upper], cosine[upper]
    spread = (np.arange(len(x)) * 0.618 % 1 - 0.5) * 0.5  # scores are whole numbers: side by side, not on top
    axes.scatter(x + spread, y, s=14, color=BLUE, alpha=0.7, linewidths=0)
    slope, offset = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, slope * ends + offset, color=ORANGE, linewidth=1.5)
    axes.set(xlabel="BLOSUM62 score of the pair", ylabel="cosine of the embeddings")
    axes.set_title(f"190 pairs, correlation {correlation:.2f}", fontsize="medium")
    axes.grid(alpha=0.3)
    return figure


def approximation_errors(
    errors: Mapping[int, Sequence[Sequence[float]]], layers: Sequence[int], own: int, estimates: bool, title: str
) -> Figure:
    """Of each number of features, the error by layer over the draws: mean, smallest and largest.

    layers: the numbers of those that have features. own: of features, as the model was trained.
    """
    figure, panels = _figure(1, 1, 7, 4.4, title)
    axes = panels.flat[0]
    for number, ((features, found), colour) in enumerate(zip(errors.items(), _SERIES, strict=False)):
        mean = np.array([np.mean(draws) for draws in found])
        spread = np.array([[np.min(draws), np.max(draws)] for draws in found]).T
        bars = np.abs(spread - mean)
        label = f"{features} features" + (" (as trained)" if features == own else "")
        x = np.arange(len(layers)) + 0.06 * (number - (len(errors) - 1) / 2)  # bars next to each other
        axes.errorbar(x, mean, yerr=bars, color=colour, marker="o", capsize=3, linewidth=1.5, label=label)
    axes.set_xticks(range(len(layers)), [str(n) for n in layers])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(0, 1.1 * max(max(draws) for found in errors.values() for draws in found))
    axes.set(xlabel="layer", ylabel="‖own − softmax‖ / ‖softmax‖ of the output")
    if not estimates:
        axes.set_title("this kernel does not estimate softmax: a distance, not an error", fontsize="small", color=GREY)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _figure(rows: int, columns: int, width: float, height: float, title: str) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches: wide letters stay on the page
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
