"""What the report concludes from measured times, on times made up for it."""

from __future__ import annotations

import pytest

from longseq.benchmarks.ladder import predict
from longseq.benchmarks.results import Crossover, Measurement, crossover, memory_slope, ratios, time_a_token


def series(seconds: dict[int, float], memory_a_token: int = 0, fixed: int = 0) -> list[Measurement]:
    return [
        Measurement("causal", "forward", "favor", length, (9 * t, t, t / 9), fixed + memory_a_token * length)
        for length, t in seconds.items()
    ]


def test_ratios_are_of_medians_at_the_lengths_that_both_have():
    assert ratios(series({8: 6.0, 16: 1.0}), series({8: 2.0, 32: 1.0})) == {8: 3.0}


def test_crossover_of_power_laws_is_where_they_meet():
    ours = series({n: 3e-6 * n for n in (512, 1024, 2048, 4096)})
    exact = series({n: 2e-9 * n**2 for n in (512, 1024, 2048, 4096)})
    found = crossover(ratios(exact, ours))
    assert found is not None
    assert (found.relation, found.length) == ("=", pytest.approx(1500))


def test_crossover_is_the_last_one_where_noise_makes_several():
    found = crossover({512: 1.2, 1024: 0.5, 2048: 2.0})
    assert found is not None
    assert (found.relation, found.length) == ("=", pytest.approx(1024 * 2**0.5))


def test_crossover_outside_the_measured_lengths_is_a_bound():
    assert crossover({512: 0.2, 1024: 0.9}) == Crossover(">", 1024)
    assert crossover({512: 1.1, 1024: 3.0}) == Crossover("<", 512)
    assert crossover({}) is None


def test_time_a_token_is_relative_to_the_first_length_from_4096():
    found = time_a_token(series({1024: 9.0, 5000: 5.0, 10_000: 20.0}))
    assert found == pytest.approx({5000: 1.0, 10_000: 2.0})
    assert time_a_token(series({1024: 9.0})) == {}


def test_memory_slope_leaves_the_fixed_part_out():
    assert memory_slope(series({512: 1.0, 1024: 1.0, 4096: 1.0}, 800, fixed=10**7), rows=8) == pytest.approx(100)
    assert memory_slope(series({512: 1.0}), rows=8) is None


def test_prediction_goes_on_with_the_last_growth():
    quadratic, linear = [(100, 1.0), (200, 4.0)], [(100, 1.0), (200, 2.0)]
    assert predict(quadratic, 800) == pytest.approx(64)
    assert predict(linear, 800) == pytest.approx(8)


def test_prediction_holds_the_growth_between_linear_and_quadratic():
    assert predict([(100, 3.0), (200, 2.0)], 400) == pytest.approx(4)
    assert predict([(100, 0.1), (200, 2.0)], 400) == pytest.approx(8)
    assert predict([(200, 2.0)], 400) == pytest.approx(8)
    assert predict([], 400) == 0
