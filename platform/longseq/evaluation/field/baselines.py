"""What can be said of a mutation without a model, and without homologues: the letters alone. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from longseq.evaluation.figures import blosum62
from longseq.evaluation.variants import Variant
from longseq_data.synth.substitution import blosum62_process
from longseq_data.vocabulary import RESIDUES, STANDARD

FREQUENCIES, BLOSUM62 = "residue frequencies", "BLOSUM62"


def baselines() -> dict[str, Callable[[Iterable[Variant]], npt.NDArray[np.float64]]]:
    """By name, a function that scores variants.

    "residue frequencies": Σ log f(new) − log f(old), with f the background of BLOSUM62: the same at every site.
    "BLOSUM62": the sum of the matrix's scores. Letters beside the 20 count as X, and X as the mean of the 20.
    """
    logs = _with_x(np.log(blosum62_process().background))
    matrix = _with_x(_with_x(blosum62()).T).T
    return {FREQUENCIES: _scorer(logs[None] - logs[:, None]), BLOSUM62: _scorer(matrix)}


def _with_x(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """(20, ...) to (RESIDUES, ...)."""
    wide = np.repeat(values.mean(0, keepdims=True), RESIDUES, axis=0)
    wide[:STANDARD] = values
    return wide


def _scorer(gain: npt.NDArray[np.floating]) -> Callable[[Iterable[Variant]], npt.NDArray[np.float64]]:
    def scores(variants: Iterable[Variant]) -> npt.NDArray[np.float64]:
        return np.array([sum(gain[old, new] for _, old, new in each.changes) for each in variants], dtype=np.float64)

    return scores
