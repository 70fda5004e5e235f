"""Projection matrices: pure functions, orthogonal, Gaussian at the margin."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo

from longseq.attention.arguments import hashed
from longseq.attention.projections import projection_matrix

F32, F64 = torch.float32, torch.float64


def test_a_matrix_is_a_function_of_seed_layer_and_draw_alone():
    torch.manual_seed(1)
    first = projection_matrix(24, 8, seed=3, layer=1, draw=2).clone()
    projection_matrix.cache_clear()
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
@pytest.mark.parametrize("rows", ["chi", "sqrt_d"])
def test_rows_of_a_block_are_orthogonal(features, rows):
    matrix = projection_matrix(features, 8, rows=rows, dtype=torch.float64)
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


def chi_mean(d: int) -> float:
    return math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_row_lengths_are_chi_distributed(orthogonal):
    lengths = projection_matrix(20_001, 5, orthogonal=orthogonal, dtype=torch.float64).norm(dim=1)
    assert lengths.mean().item() == pytest.approx(chi_mean(5), rel=0.01)
    assert lengths.var().item() == pytest.approx(5 - chi_mean(5) ** 2, rel=0.05)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_regularised_rows_have_length_sqrt_d_and_keep_their_directions(orthogonal):
    gaussian, regular = (
        projection_matrix(13, 5, orthogonal=orthogonal, rows=rows, dtype=torch.float64) for rows in ("chi", "sqrt_d")
    )
    torch.testing.assert_close(regular.norm(dim=1), torch.full((13,), 5**0.5, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(regular, gaussian / gaussian.norm(dim=1, keepdim=True) * 5**0.5)


def test_blocks_are_independent_of_each_other():
    """Cosines between rows of neighbouring blocks have the variance 1/d of independent directions."""
    blocks = projection_matrix(6000, 3, rows="sqrt_d", dtype=torch.float64).view(-1, 3, 3) / 3**0.5
    cosines = blocks[0::2] @ blocks[1::2].mT
    assert cosines.mean().abs() < 0.02
    assert cosines.square().mean().item() == pytest.approx(1 / 3, rel=1e-6)  # rows of two orthonormal bases
    assert (cosines**4).mean().item() == pytest.approx(1 / 5, rel=0.03)  # E[u⁴] of a uniform direction in 3-space


@pytest.mark.parametrize(
    ("orthogonal", "first", "last"),
    [
        (
            True,
            [-0.5553256371, -1.0699375415, -0.0380250850, -0.8555871056],
            [-0.7309296985, -1.2329469482, -1.1318041822, -0.4014184436],
        ),
        (
            False,
            [-0.6597028532, -1.7747118606, 1.7249364133, -0.8049287844],
            [1.3956955193, -0.4905328961, 1.2997762270, 0.9477338259],
        ),
    ],
)
def test_the_values_of_a_seed_are_those_that_runs_were_started_with(orthogonal, first, last):
    matrix = projection_matrix(7, 4, seed=1, layer=2, draw=3, orthogonal=orthogonal, dtype=torch.float64)
    torch.testing.assert_close(matrix[0], torch.tensor(first, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix[-1], torch.tensor(last, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": 0}, "features must be an integer from 1 to 2.63 - 1, got 0"),
        ({"head_dim": -1}, "head_dim must be an integer from 1"),
        ({"rows": "unit"}, "unknown rows 'unit'; the row lengths are chi, sqrt_d"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        projection_matrix(**{"features": 4, "head_dim": 4, **change})


def test_a_matrix_made_during_validation_can_be_trained_with():
    projection_matrix.cache_clear()
    with torch.inference_mode():
        matrix = projection_matrix(8, 4)
    x = torch.randn(3, 4, requires_grad=True)
    (x @ matrix.T).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["seed", "layer", "draw"])
@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])[0], np.array(3)])
@pytest.mark.parametrize("first", ["int", "other"])
def test_a_number_counts_by_its_value_and_not_by_its_type(name, three, first):
    expected = projection_matrix.__wrapped__(4, 4, **{name: 3})
    projection_matrix.cache_clear()
    both = [3, three] if first == "int" else [three, 3]
    for number in both:
        assert torch.equal(projection_matrix(4, 4, **{name: number}), expected)
    assert torch.equal(projection_matrix.__wrapped__(4, 4, **{name: three}), expected)
    assert not torch.equal(projection_matrix(4, 4, **{name: 1}), expected)


@pytest.mark.parametrize("name", ["features", "head_dim", "seed", "layer", "draw"])
@pytest.mark.parametrize(
    "number", [3.0, True, False, np.float32(3), np.True_, torch.tensor(3.0), torch.tensor(True), "3", None, 3j]
)
def test_what_is_no_integer_is_refused_by_name_also_behind_an_equal_one(name, number):
    sizes = {"features": 4, "head_dim": 4}
    for equal in (1, 3):
        projection_matrix(**{**sizes, name: equal})
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got "):
        projection_matrix(**{**sizes, name: number})


@pytest.mark.parametrize("name", ["seed", "layer", "draw"])
@pytest.mark.parametrize("number", [-1, 2**63, np.int64(-3)])
def test_negative_and_huge_numbers_are_refused_by_name(name, number):
    with pytest.raises(ValueError, match=f"^{name} must be an integer from 0 to 2.63 - 1, got {number}"):
        projection_matrix(4, 4, **{name: number})


def test_a_matrix_is_the_same_for_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    sizes = list(itertools.product((64, 96, 130, 256), (0, 1)))
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(
                [projection_matrix.__wrapped__(300, d, seed=s, dtype=dtype) for d, s in sizes for dtype in (F32, F64)]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("features", "head_dim"), [(256, 64), (7, 4), (3, 1), (130, 96), (300, 128), (20, 2)])
def test_rotations_are_those_of_qr_with_a_positive_diagonal(features, head_dim):
    rng = torch.Generator().manual_seed(hashed(8, "projection", 5, 6, 7) >> 1)
    blocks = []
    for _ in range(-(-features // head_dim)):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=rng, dtype=F64))
        blocks.append(q * r.diagonal().sign())
    lengths = torch.randn(features, head_dim, generator=rng, dtype=F64).norm(dim=1, keepdim=True)
    expected = torch.cat(blocks)[:features] * lengths
    matrix = projection_matrix(features, head_dim, seed=5, layer=6, draw=7, dtype=F64)
    torch.testing.assert_close(matrix, expected, rtol=1e-11, atol=1e-11)  # those that runs were started with


def test_a_matrix_first_drawn_inside_a_compiled_function_is_the_same():
    expected = [projection_matrix.__wrapped__(96, 64, draw=draw, dtype=F64) for draw in range(3)]
    projection_matrix.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(lambda draw: projection_matrix(96, 64, draw=draw, dtype=F64) * 1, backend="eager")
    assert all(torch.equal(compiled(draw), matrix) for draw, matrix in enumerate(expected))
