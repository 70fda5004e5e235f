"""The empirical baseline against hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longseq.evaluation.metrics import Quality, frequency_baseline


def test_the_baseline_predicts_the_training_frequencies():
    train = np.array([5, 2, 0])  # plus one each: 6/10, 3/10, 1/10
    targets = np.array([3, 4, 1])
    baseline = frequency_baseline(train, targets)
    assert baseline.loss == pytest.approx(-(3 * math.log(0.6) + 4 * math.log(0.3) + math.log(0.1)) / 8)
    assert baseline.accuracy == 3 / 8  # always the first token, the training data's most frequent


@pytest.mark.parametrize("size", [2, 20, 29])
def test_uniform_data_have_as_much_perplexity_as_there_are_tokens(size):
    uniform = np.full(size, 1000)
    baseline = frequency_baseline(uniform, uniform)
    assert baseline.perplexity == pytest.approx(size)
    assert baseline.accuracy == pytest.approx(1 / size)


def test_large_data_have_the_perplexity_of_their_entropy():
    counts = np.array([700_000, 200_000, 100_000])
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert frequency_baseline(counts, counts).loss == pytest.approx(entropy, rel=1e-5)


def test_a_token_the_training_data_lack_costs_much_and_not_infinitely_much():
    baseline = frequency_baseline(np.array([998, 0]), np.array([0, 5]))
    assert baseline.loss == pytest.approx(math.log(1000))
    assert baseline.accuracy == 0


def test_no_frequencies_beat_those_of_the_data_themselves():
    targets = np.array([50_000, 30_000, 20_000])
    own = frequency_baseline(targets, targets)
    for train in ([1, 1, 1], [2, 5, 3], [5000, 3500, 1500]):
        assert frequency_baseline(np.array(train), targets).loss > own.loss


def test_perplexity_of_a_hopeless_model_is_a_number():
    assert Quality(loss=0.0, accuracy=1.0).perplexity == 1.0
    assert math.isfinite(Quality(loss=1e6, accuracy=0.0).perplexity)
    assert Quality(loss=2.0, accuracy=0.5).as_dict() == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.e**2),
        "accuracy": 0.5,
    }
