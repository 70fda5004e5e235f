"""The estimators' measured errors are those of the paper's closed forms, and the report holds what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from longseq.benchmarks.features import (
    AttentionError,
    EstimatorError,
    Pair,
    as_dict,
    closed_form,
    figure,
    measure_attention_error,
    measure_estimators,
    table,
)


@pytest.fixture(scope="module")
def estimators() -> list[EstimatorError]:
    return measure_estimators(draws=60_000)


@pytest.fixture(scope="module")
def attention() -> list[AttentionError]:
    return measure_attention_error(length=160, projections=(8, 32, 128), stds=(0.4, 0.8), draws=6)


def test_a_pair_has_the_lengths_and_the_angle_it_states():
    pair = Pair(0.7, 1.1, 130)
    x, y = pair.vectors()
    assert x.norm().item() == pytest.approx(0.7)
    assert y.norm().item() == pytest.approx(1.1)
    assert torch.rad2deg(torch.arccos(x @ y / 0.77)).item() == pytest.approx(130)
    assert pair.dot == pytest.approx((x @ y).item())


def test_measured_errors_are_within_5_percent_of_the_closed_forms(estimators):
    measured = [e for e in estimators if not e.formula_is_bound]
    assert {e.estimator for e in measured} == {"positive", "hyperbolic", "trigonometric"}
    for e in measured:
        assert e.measured == pytest.approx(e.formula, rel=0.05), e
        assert e.standard_error < 0.02 * e.formula, e


def test_orthogonal_rows_are_below_their_bound_and_below_independent_ones(estimators):
    orthogonal = [e for e in estimators if e.formula_is_bound]
    assert len(orthogonal) == 4
    for e in orthogonal:
        assert e.measured < e.formula < closed_form("positive", e.pair), e


def test_the_same_seed_measures_the_same_numbers():
    first, again, other = (measure_estimators(draws=1, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_more_projections_come_closer_to_the_exact_attention(attention):
    for estimator, projection in {(a.estimator, a.projection) for a in attention}:
        rows = [a for a in attention if (a.estimator, a.projection, a.std) == (estimator, projection, 0.4)]
        assert [a.projections for a in rows] == [8, 32, 128]
        assert rows[0].output > 2 * rows[1].output > 4 * rows[2].output
        assert rows[0].matrix > 1.5 * rows[1].matrix > 2 * rows[2].matrix


def test_orthogonal_projections_have_a_smaller_error_than_independent_ones(attention):
    error = {(a.estimator, a.projection): a.matrix for a in attention if (a.std, a.projections) == (0.4, 8)}
    for estimator in ("positive", "trigonometric"):
        assert error[estimator, "orthogonal"] < error[estimator, "iid"]


def test_trigonometric_features_break_down_where_positive_ones_do_not(attention):
    error = {a.estimator: a.output for a in attention if (a.std, a.projections, a.projection) == (0.8, 8, "iid")}
    assert error["trigonometric"] > 10 * error["positive"]


def test_the_table_and_the_dictionary_hold_every_row(estimators, attention):
    text = table(estimators, attention)
    assert len(text.splitlines()) == len(estimators) + len(attention) + 7
    assert f"{estimators[0].measured:.5f}" in text
    back = json.loads(json.dumps(as_dict(estimators, attention)))
    assert back["attention"][3]["output"] == attention[3].output
    assert back["estimators"][0]["pair"] == {"x": 0.5, "y": 0.5, "angle": 30}
    assert "attention" not in table(estimators, [])


def test_the_figure_has_a_logarithmic_curve_for_each_estimator_and_projection(attention, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawing = figure(attention)
    assert len(drawing.axes) == 4
    for axes in drawing.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert len(axes.containers) == 4
    drawing.savefig(tmp_path / "error.png")
    assert (tmp_path / "error.png").read_bytes()[:4] == b"\x89PNG"
