"""How well scores predict measurements: the five measures of ProteinGym (Notin et al. 2023), as its script has them.

https://github.com/OATML-Markslab/ProteinGym, proteingym/performance_DMS_benchmarks.py. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]

MEASURES = ("Spearman", "AUC", "MCC", "NDCG", "Top_recall")
TOP = 10  # per cent of an assay that NDCG and top recall look at
DEPTHS = ("1", "2", "3", "4", "5+")  # changes of a mutant


@dataclass(frozen=True)
class Result:
    """What the scores of one assay are worth."""

    measures: dict[str, float]
    by_depth: dict[str, dict[str, float]]  # number of changes: measures; of indels empty
    baselines: dict[str, dict[str, float]]  # name: measures; of indels empty


def measures(measured: Floats, scores: Floats, fit: Labels | None, above_median: Labels) -> dict[str, float]:
    """All five, by name; NaN where one is not defined.

    Args:
        measured: (n,) DMS_score, larger is fitter.
        scores: (n,) what the model says, larger is fitter.
        fit: (n,) DMS_score_bin; None: not known, and AUC and MCC are NaN.
        above_median: (n,) the scores as labels, from :func:`above_median` of the whole assay.
    """
    return {
        "Spearman": spearman(measured, scores),
        "AUC": math.nan if fit is None else auc(fit, scores),
        "MCC": math.nan if fit is None else mcc(fit, above_median),
        "NDCG": ndcg(measured, scores),
        "Top_recall": top_recall(measured, scores),
    }


def measures_by_depth(
    measured: Floats, scores: Floats, fit: Labels | None, changes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """The same of the mutants with 1, 2, 3, 4 and 5 or more changes; only numbers that occur."""
    depth = np.minimum(np.asarray(changes), len(DEPTHS))
    labels = above_median(scores)
    found = {}
    for number, name in enumerate(DEPTHS, 1):
        these = depth == number
        if these.any():
            own = None if fit is None else fit[these]
            found[name] = measures(measured[these], scores[these], own, labels[these])
    return found


def ranks(values: Floats) -> Floats:
    """From 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def spearman(a: Floats, b: Floats) -> float:
    """Pearson's correlation of the ranks; NaN where one of the two is constant, or of fewer than two values."""
    a, b = (ranks(each) - (len(each) + 1) / 2 for each in (a, b))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def auc(fit: Labels, scores: Floats) -> float:
    """Area under the ROC curve: how often a fit mutant scores above an unfit one, a tie being a half."""
    positive = int(fit.sum())
    pairs = positive * (len(fit) - positive)
    return (float(ranks(scores)[fit].sum()) - positive * (positive + 1) / 2) / pairs if pairs else math.nan


def above_median(scores: Floats) -> Labels:
    """(n,) whether a score is at least the median of them all: the model's labels for MCC."""
    return scores >= np.median(scores)


def mcc(fit: Labels, predicted: Labels) -> float:
    """Matthews' correlation of two labellings; 0 where one of them is constant."""
    a, b = fit - fit.mean(), predicted - predicted.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def ndcg(measured: Floats, scores: Floats) -> float:
    """Discounted gain of the TOP % with the highest scores, over that of the TOP % with the highest measurements.

    The gain is DMS_score scaled to [0, 1]. Among equal scores the earlier row comes first.
    """
    lowest, highest = measured.min(), measured.max()
    if lowest == highest:
        return math.nan
    gains = (measured - lowest) / (highest - lowest)
    size = math.floor(len(gains) * (TOP / 100))
    discounts = 1 / np.log2(np.arange(2, size + 2))
    best = float(np.sort(gains)[::-1][:size] @ discounts)
    return float(gains[np.argsort(-scores, kind="stable")[:size]] @ discounts) / best if best else 0.0


def top_recall(measured: Floats, scores: Floats) -> float:
    """The share of the mutants above the 90th percentile of DMS_score that are above it in the scores, too."""
    best, chosen = (each > np.percentile(each, 100 - TOP) for each in (measured, scores))
    return float((best & chosen).sum() / best.sum()) if best.any() else math.nan
