"""How well predicted labels fit: measures with 95 % intervals by the bootstrap over sequences. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq.evaluation.field.measures import auc, spearman
from longseq.evaluation.summary import LEVEL
from longseq.printed import plain
from longseq_data.randomness import generator
from longseq_data.vocabulary import IGNORE

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

OF_NUMBERS = ("spearman", "pearson", "r2", "mse")
OF_CLASSES = ("accuracy", "mcc", "macro_f1", "auc")
MEASURES = (*OF_NUMBERS, *OF_CLASSES)
LETTERS = "ridge on one-hot letters"


def summary(
    labels: Sequence[npt.NDArray[Any]], told: Sequence[npt.NDArray[Any]], classes: int, *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """What an evaluation reports of one split.

    Args:
        labels: of each sequence (1,), or per residue (n,): ids of classes, IGNORE where there is none; or numbers, NaN.
        told: of each sequence (1 or n, classes) probabilities, or (1 or n, 1) numbers.
        classes: how many; 0: labels are numbers.
        bootstrap: resamplings of whole sequences (Efron 1979; percentiles); 0: no intervals.

    Returns:
        ``sequences``, ``labels`` and by their names the measures; ``intervals`` of each. None where one is not defined.
    """
    known = [row != IGNORE if classes else ~np.isnan(row) for row in labels]
    truth = np.concatenate([row[here] for row, here in zip(labels, known, strict=True)])
    made = np.concatenate([row[here] for row, here in zip(told, known, strict=True)]).astype(np.float64)
    counts = np.array([int(here.sum()) for here in known])

    def measured(these: Integers | slice) -> dict[str, float]:
        return of_classes(truth[these], made[these]) if classes else of_numbers(truth[these], made[these, 0])

    found: dict[str, Any] = {"sequences": len(labels), "labels": len(truth), **measured(slice(None))}
    if bootstrap:
        starts, drawn = np.cumsum(counts) - counts, []
        for number in range(bootstrap):
            rows = (generator(seed, "bootstrap labels", number).random(len(counts)) * len(counts)).astype(np.int64)
            sizes = counts[rows]
            begins = np.cumsum(sizes) - sizes
            drawn.append(measured(np.repeat(starts[rows] - begins, sizes) + np.arange(sizes.sum())))
        found["intervals"] = {name: _interval([each[name] for each in drawn]) for name in drawn[0]}
    return plain(found)


def _interval(values: Sequence[float]) -> list[float]:
    defined = [value for value in values if not math.isnan(value)] or [math.nan]
    return [float(value) for value in np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])]


def of_numbers(truth: Floats, told: Floats) -> dict[str, float]:
    """Rank correlation, correlation, share of the variance that is explained, and mean squared error."""
    if not len(truth):
        return dict.fromkeys(OF_NUMBERS, math.nan)
    # The mean of equal numbers is not quite one of them.
    a, b = (each - each.mean() if np.ptp(each) else np.zeros(len(each)) for each in (truth, told))
    spread, errors = float(a @ a), float(((truth - told) ** 2).sum())
    scale = math.sqrt(spread * float(b @ b))
    return {
        "spearman": spearman(truth, told),
        "pearson": float(a @ b) / scale if scale else math.nan,
        "r2": 1 - errors / spread if spread else math.nan,
        "mse": errors / len(truth),
    }


def of_classes(truth: Integers, told: Floats) -> dict[str, float]:
    """Accuracy, Matthews' correlation (of several classes: Gorodkin 2004), the mean of the classes' F1, and of two
    classes the area under the ROC curve.

    Args:
        truth: (n,).
        told: (n, classes) probabilities.
    """
    classes = told.shape[1]
    counts = np.bincount(truth * classes + told.argmax(1), minlength=classes**2).reshape(classes, classes)
    right, true, said, total = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    there = true + said > 0
    scale = math.sqrt(float(total**2 - (said**2).sum()) * float(total**2 - (true**2).sum()))
    found = {
        "accuracy": float(right.sum() / total) if total else math.nan,
        "mcc": float(right.sum() * total - true @ said) / scale if scale else 0.0,
        "macro_f1": float((2 * right[there] / (true + said)[there]).mean()) if total else math.nan,
    }
    return {**found, "auc": auc(truth == 1, told[:, 1])} if classes == 2 else found


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """A line for each model, split and measure; below a model's those of the regression on letters."""
    models = {id(report): f"{report['name']} step {report['step']}" for report in reports}
    width = max(len(LETTERS), *map(len, models.values()))
    lines = [
        f"{'model':<{width}}  {'split':<8}{'sequences':>11}{'labels':>9}  {'measure':<10}{'value':>9}  95 % interval"
    ]
    for report in reports:
        for split, values in report["splits"].items():
            lines += _lines(f"{models[id(report)]:<{width}}  {split:<8}", values)
            if "ridge_on_letters" in values:
                lines += _lines(f"{LETTERS:<{width}}  {split:<8}", values["ridge_on_letters"])
    return "\n".join(lines)


def _lines(begin: str, values: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in (measure for measure in MEASURES if measure in values):
        low, high = values.get("intervals", {}).get(name, (None, None))
        between = "" if low is None else f"  {_shown(low)} to {_shown(high)}"
        counts = f"{values['sequences']:>11,}{values['labels']:>9,}"
        lines.append(f"{begin}{counts}  {name:<10}{_shown(values[name]):>9}{between}")
    return lines


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
