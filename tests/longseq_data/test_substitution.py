"""The substitution process is BLOSUM62's, and the simulation is exact."""

from __future__ import annotations

import numpy as np
import pytest
from Bio.Align import substitution_matrices

from longseq_data.synth.substitution import AMINO_ACIDS, blosum62_process, draw_background, substitute

pytestmark = pytest.mark.interfaces


def transition(time: float) -> np.ndarray:
    """exp(Qt) by scaling and squaring a Taylor series: the oracle, and no eigenvectors in it."""
    step = blosum62_process().rates * time / 2**20
    result = np.eye(20) + step + step @ step / 2
    for _ in range(20):
        result = result @ result
    return result


def test_process_has_its_background_as_stationary_distribution_in_detailed_balance():
    process = blosum62_process()
    flux = process.background[:, None] * process.rates
    assert process.background.sum() == pytest.approx(1, abs=1e-12)
    assert process.background.min() > 0.01
    np.testing.assert_allclose(process.background @ process.rates, 0, atol=1e-13)
    np.testing.assert_allclose(flux, flux.T, atol=1e-13)
    assert (process.rates[~np.eye(20, dtype=bool)] >= 0).all()
    assert -np.trace(flux) == pytest.approx(1, abs=1e-12)  # one substitution a unit of time


@pytest.mark.parametrize("time", [0.01, 0.35, 1.38, 7.0])
def test_transitions_are_probabilities_that_keep_the_background(time: float):
    matrix = transition(time)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-8)
    np.testing.assert_allclose(blosum62_process().background @ matrix, blosum62_process().background, atol=1e-8)


def test_log_odds_at_the_reference_time_are_blosum62():
    process = blosum62_process()
    half_bits = 2 * np.log2(transition(process.reference_time) / process.background)
    published = substitution_matrices.load("BLOSUM62")
    scores = np.array([[published[a, b] for b in AMINO_ACIDS] for a in AMINO_ACIDS])
    assert np.abs(np.rint(half_bits) - scores).max() <= 1
    # In the scale that the scores themselves imply, nearly all of them come back exactly.
    scale = (half_bits * scores).sum() / (scores * scores).sum()
    assert (np.rint(half_bits / scale) == scores).mean() > 0.99


def test_simulated_substitutions_follow_the_transition_matrix():
    draws = 20_000
    start = np.repeat(np.arange(20, dtype=np.uint8), draws)
    end = substitute(start, np.full(len(start), 0.8), np.random.default_rng(5))
    seen = np.bincount(start.astype(int) * 20 + end, minlength=400).reshape(20, 20) / draws
    expected = transition(0.8)
    sigma = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(seen - expected) < 5 * sigma + 2 / draws).all()


def test_residues_are_drawn_from_the_background():
    draws = 200_000
    expected = blosum62_process().background
    seen = np.bincount(draw_background(draws, np.random.default_rng(6)), minlength=20) / draws
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / draws)).all()
