"""How many of the surest contacts are contacts. No torch here."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from longseq.evaluation.field.averages import mean

Matrix = npt.NDArray[np.floating]

# Separations |i − j|, from and to. "all" is what the three hold together.
RANGES = {"short": (6, 11), "medium": (12, 23), "long": (24, math.inf), "all": (6, math.inf)}
SHARES = {"L": 1, "L/2": 2, "L/5": 5}
NEAREST = 6  # separation below which a pair is no question

Precision = dict[str, dict[str, float]]  # range: share of L: precision


def apc(scores: Matrix) -> Matrix:
    """Average product correction (Dunn et al. 2008) of symmetric scores (..., L, L): less row sum × column sum / sum.

    Where all scores are 0, they stay so.
    """
    rows, columns = scores.sum(-1, keepdims=True), scores.sum(-2, keepdims=True)
    total = scores.sum((-1, -2), keepdims=True)
    expected = np.divide(rows * columns, total, out=np.zeros_like(scores), where=total != 0)
    return scores - expected


def precisions(scores: Matrix, contacts: npt.NDArray[np.bool_]) -> Precision:
    """Of the L, L/2 and L/5 highest scores in each range of separations, the share that are contacts.

    Args:
        scores: (L, L), symmetric; larger is surer.
        contacts: (L, L), True above the diagonal where residues touch.

    Returns:
        NaN where the chain is too short for the range. Where it has fewer pairs than are asked for, all of them.
    """
    first, second = np.triu_indices(len(scores), NEAREST)
    order = np.argsort(-scores[first, second], kind="stable")
    hits, distance = contacts[first, second][order], (second - first)[order]
    found: Precision = {}
    for name in RANGES:
        these = hits[_within(distance, name)]
        found[name] = {
            share: float(these[: max(1, len(scores) // part)].mean()) if len(these) else math.nan
            for share, part in SHARES.items()
        }
    return found


def chance(contacts: npt.NDArray[np.bool_]) -> Precision:
    """What pairs in a random order reach on average: the share of each range's pairs that are contacts."""
    first, second = np.triu_indices(len(contacts), NEAREST)
    hits, distance = contacts[first, second], second - first
    rates = {name: hits[_within(distance, name)] for name in RANGES}
    return {name: dict.fromkeys(SHARES, float(of.mean()) if len(of) else math.nan) for name, of in rates.items()}


def _within(distance: npt.NDArray[np.integer], name: str) -> npt.NDArray[np.bool_]:
    low, high = RANGES[name]
    return (distance >= low) & (distance <= high)


def mean_precision(chains: list[Precision]) -> Precision:
    """The mean over chains that are long enough for the range."""
    return {name: {share: mean(chain[name][share] for chain in chains) for share in SHARES} for name in RANGES}
