"""Projection matrices: pure functions, orthogonal, Gaussian at the margin."""

from __future__ import annotations

import itertools

import pytest
import torch

from longseq.attention import projection_matrix
from longseq.attention.projections import projection_matrix as cached


def test_a_matrix_is_a_function_of_seed_layer_and_draw_alone():
    torch.manual_seed(1)
    first = projection_matrix(24, 8, seed=3, layer=1, draw=2).clone()
    cached.cache_clear()
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, projection_matrix(24, 8, seed=3, layer=1, draw=2))


def test_each_of_seed_layer_and_draw_gives_another_matrix():
    matrices = [projection_matrix(8, 8, seed=s, layer=i, draw=d) for s, i, d in itertools.product(range(3), repeat=3)]
    for one, other in itertools.combinations(matrices, 2):
        assert (one - other).abs().max() > 0.1


def test_it_never_touches_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    projection_matrix(10, 6, seed=99)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("features", [5, 8, 20])
def test_rows_of_a_block_are_orthogonal(features):
    matrix = projection_matrix(features, 8, dtype=torch.float64)
    assert matrix.shape == (features, 8)
    for block in matrix.split(8):
        gram = block @ block.T
        off_diagonal = gram - torch.diag(gram.diagonal())
        assert off_diagonal.abs().max() < 1e-12


@pytest.mark.parametrize("orthogonal", [True, False])
def test_rows_are_standard_gaussian_at_the_margin(orthogonal):
    """Mean 0, covariance I, and the fourth moment of a Gaussian: fails without χ lengths or QR's sign correction."""
    draws = [projection_matrix(4, 4, seed=s, orthogonal=orthogonal, dtype=torch.float64) for s in range(4000)]
    rows = torch.cat(draws)
    assert rows.mean(0).abs().max() < 0.03
    assert (rows.T @ rows / len(rows) - torch.eye(4)).abs().max() < 0.05
    assert (rows**4).mean().item() == pytest.approx(3.0, abs=0.15)
    first_entries = torch.stack([draw[0, 0] for draw in draws])
    assert (first_entries > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_matrix_made_during_validation_can_be_trained_with():
    cached.cache_clear()
    with torch.inference_mode():
        matrix = projection_matrix(8, 4)
    x = torch.randn(3, 4, requires_grad=True)
    (x @ matrix.T).square().sum().backward()
    assert x.grad is not None
