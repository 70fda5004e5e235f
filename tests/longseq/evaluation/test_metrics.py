"""The empirical baseline, and what a loss means whatever the tokens are, against hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longseq.evaluation.metrics import Quality, bits_per_unit, frequency_baseline, word_perplexity


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


def test_a_byte_guessed_at_random_costs_eight_bits():
    assert bits_per_unit(math.log(256), 1000, 1000) == pytest.approx(8)
    assert bits_per_unit(math.log(256), 1010, 1000) == pytest.approx(8 * 1.01)  # ends of documents cost too


def test_bits_a_byte_do_not_depend_on_how_the_text_is_cut_into_tokens():
    """A model that gives a text of 40 bytes probability 2^-60, in 10 tokens or in 30."""
    assert bits_per_unit(60 * math.log(2) / 10, 10, 40) == pytest.approx(1.5)
    assert bits_per_unit(60 * math.log(2) / 30, 30, 40) == pytest.approx(1.5)


@pytest.mark.parametrize(("split", "multiplier"), [("train", 1.5634), ("valid", 1.5487), ("test", 1.5359)])
def test_word_perplexity_is_the_papers_with_its_multiplier(split, multiplier):
    words = 10**6
    assert word_perplexity(2.3, round(multiplier * words), words) == pytest.approx(math.exp(multiplier * 2.3))


def test_word_perplexity_is_that_of_a_word_level_model():
    """Four words of 2, 3, 1 and 2 tokens; the perplexity is the inverse of the words' geometric mean probability."""
    tokens = [[0.5, 0.1], [0.9, 0.8, 0.2], [0.25], [0.3, 0.4]]
    losses = [-math.log(p) for word in tokens for p in word]
    expected = math.prod(math.prod(word) for word in tokens) ** (-1 / 4)
    assert word_perplexity(sum(losses) / 8, 8, 4) == pytest.approx(expected)


def test_nothing_to_count_is_not_a_number():
    assert math.isnan(bits_per_unit(1.0, 1, 0))
    assert math.isnan(word_perplexity(1.0, 1, 0))
