"""How residues are exchanged over time: the Markov process behind BLOSUM62, and its exact simulation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from Bio.Align import substitution_matrices
from numpy.typing import NDArray

from longseq_data.vocabulary import LETTERS, STANDARD

AMINO_ACIDS = LETTERS[:STANDARD]

Floats = NDArray[np.float64]
Residues = NDArray[np.uint8]  # ids of the vocabulary, the 20 amino acids only


@dataclass(frozen=True)
class SubstitutionProcess:
    """A reversible Markov process on the 20 amino acids, in the order of ``AMINO_ACIDS``.

    background: (20,) p, the stationary distribution.
    rates: (20, 20) Q, rows sum to zero, p_i Q_ij = p_j Q_ji; one substitution a site in one unit of time, on average.
    reference_time: the time after which a pair of residues is distributed as BLOSUM62's aligned pairs are.
    """

    background: Floats
    rates: Floats
    reference_time: float


@lru_cache(maxsize=1)
def blosum62_process() -> SubstitutionProcess:
    """The Markov process whose log-odds are BLOSUM62 (Henikoff & Henikoff 1992, PNAS 89:10915).

    A score is s_ij = ln(q_ij / p_i p_j) / λ, with q the frequencies of aligned pairs and p those of residues.
    Published p do not return the published scores exactly, but the scores alone determine p and λ (Yu, Wootton &
    Altschul 2003, PNAS 100:15688): q has the margins p when Σ_j p_j exp(λ s_ij) = 1 for all i, so
    p(λ) = exp(λS)⁻¹ 1, and λ > 0 is where p(λ) sums to one (0.324; half a bit is 0.347).

    P = q_ij / p_i is then the transition matrix over BLOSUM62's own divergence, with p stationary and in detailed
    balance, and Q = log P by the eigen-decomposition of the symmetric p^½ P p^-½, whose eigenvalues are all
    positive. The scores are rounded to integers, which leaves two of the 190 exchange rates a little below zero
    (-0.002 where the mean is 0.07); these are set to zero in both directions, which keeps detailed balance and moves
    no score by more than 0.4. Q is finally scaled to one substitution a unit of time.
    """
    matrix = substitution_matrices.load("BLOSUM62")
    scores = np.array([[matrix[a, b] for b in AMINO_ACIDS] for a in AMINO_ACIDS], dtype=np.float64)

    def implied_background(scale: float) -> Floats:
        return np.asarray(np.linalg.solve(np.exp(scale * scores), np.ones(len(scores))), dtype=np.float64)

    low, high = 0.25, 0.45  # the sum is above one at the first and below one at the second
    for _ in range(52):
        scale = (low + high) / 2
        low, high = (scale, high) if implied_background(scale).sum() > 1 else (low, scale)
    background = implied_background(scale)
    background /= background.sum()

    root = np.sqrt(background)
    eigenvalues, vectors = np.linalg.eigh(root[:, None] * np.exp(scale * scores) * root)
    log_symmetric = (vectors * np.log(eigenvalues)) @ vectors.T
    rates = np.maximum(log_symmetric * root / root[:, None], 0)
    np.fill_diagonal(rates, 0)
    np.fill_diagonal(rates, -rates.sum(axis=1))
    reference_time = float(-background @ np.diag(rates))
    return SubstitutionProcess(background, rates / reference_time, reference_time)


def substitute(residues: Residues, times: Floats, rng: np.random.Generator) -> Residues:
    """Let every residue evolve by ``blosum62_process`` for its own time; returns new residues of the same shape (n,).

    Exact, by uniformisation (Jensen 1953): events come to each site as a Poisson process at the fastest rate
    μ = max_i -Q_ii, and each moves i to j with probability (I + Q/μ)_ij, which may be i itself. Most sites
    see no event on a branch, so the passes below shrink quickly and no matrix exponential is needed.
    """
    fastest, jumps = _jumps()
    residues = residues.copy()
    left = times * fastest  # mean number of events still to come at each site
    left += np.log1p(-rng.random(len(left)))  # less an exponential waiting time
    sites = np.flatnonzero(left > 0)
    left = left[sites]
    while len(sites):
        # One cumulative row per residue, laid end to end: row i fills (i, i + 1].
        drawn = np.searchsorted(jumps, residues[sites] + rng.random(len(sites)), side="right")
        residues[sites] = drawn % len(AMINO_ACIDS)
        left += np.log1p(-rng.random(len(left)))
        again = left > 0
        sites, left = sites[again], left[again]
    return residues


def draw_background(count: int, rng: np.random.Generator) -> Residues:
    """``count`` residues of the stationary distribution, from as many uniform draws."""
    return np.searchsorted(_cumulative_background(), rng.random(count), side="right").astype(np.uint8)


@lru_cache(maxsize=1)
def _jumps() -> tuple[float, Floats]:
    """μ, and the cumulative rows of I + Q/μ end to end, (400,)."""
    rates = blosum62_process().rates
    fastest = float(-np.diag(rates).min())
    rows = np.cumsum(np.eye(len(AMINO_ACIDS)) + rates / fastest, axis=1)
    rows[:, -1] = 1  # whatever the rounding, a uniform draw below one finds a column
    return fastest, (rows + np.arange(len(rows))[:, None]).ravel()


@lru_cache(maxsize=1)
def _cumulative_background() -> Floats:
    cumulative = np.cumsum(blosum62_process().background)
    cumulative[-1] = 1
    return cumulative
