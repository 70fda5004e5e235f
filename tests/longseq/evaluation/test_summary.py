"""What an evaluation reports, against hand computation; and that it does not depend on who counted what."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from longseq.evaluation.summary import by_length, by_token, calibration_error, intervals, reliability, summary
from longseq.evaluation.tally import BINS, Tally


def tally(number: list[int], seed: int = 0, vocabulary: int = 5) -> Tally:
    """Counts of some sequences, a function of their numbers alone."""
    rows = []
    for n in number:
        random = np.random.default_rng([seed, n])
        targets = int(random.integers(1, 9))
        confidence = np.zeros(BINS)
        confidence[[3, 7]] = random.random(2)
        rows.append(
            (n, 7 * n + 1, targets, random.random() * 3 * targets, random.integers(targets), targets, confidence)
        )
    ints = [np.array([row[at] for row in rows], dtype=np.int64) for at in (0, 1, 2, 4, 5)]
    loss, confidence = np.array([row[3] for row in rows]), np.array([row[6] for row in rows])
    bins = np.zeros(BINS, np.int64)
    bins[3] = bins[7] = len(number)
    tokens = np.full(vocabulary, len(number), np.int64)
    by_depth = np.stack([loss / 3, 2 * loss / 3], 1)
    rest = (bins, bins, tokens, tokens, tokens, np.zeros(3, np.int64))
    return Tally(*ints[:3], loss, *ints[3:], confidence, by_depth, (9 * by_depth).astype(np.int64), *rest)


def test_counts_put_together_are_the_same_to_the_last_bit_however_they_were_shared_out():
    whole = tally(list(range(50)))
    for shares in ([range(0, 50, 2), range(1, 50, 2)], [range(30, 50), range(7), range(7, 30)]):
        merged = Tally.merged([tally(list(share)) for share in shares])
        for item in fields(Tally):
            assert np.array_equal(getattr(merged, item.name), getattr(whole, item.name)), item.name


def test_loss_bits_and_accuracy_are_means_over_targets():
    counts = tally(list(range(20)))
    report = summary(counts, list("ACDEF"), "protein", top_k=3, bootstrap=0, seed=0)
    targets = counts.targets.sum()
    assert report["loss"] == pytest.approx(counts.loss.sum() / targets)
    assert report["bits"] == pytest.approx(report["loss"] / math.log(2))
    assert report["accuracy"] == counts.correct.sum() / targets
    assert report["top_3_accuracy"] == 1.0
    assert "intervals" not in report


def test_a_text_without_words_has_bits_per_byte_and_stays_json():
    counts = replace(tally(list(range(20))), extent=np.array([70, 0, 20]))
    report = summary(counts, list("ACDEF"), "bytes", top_k=3, bootstrap=9, seed=0)
    assert report["bits_per_byte"] == pytest.approx(counts.loss.sum() / 70 / math.log(2))
    assert (report["bytes"], report["words"]) == (70, 0)
    json.loads(json.dumps(report), parse_constant=pytest.fail)  # NaN is none


def test_calibration_error_is_the_mean_gap_of_the_bins():
    bins, right = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    bins[[2, 9]], right[[2, 9]] = [30, 10], [6, 9]
    confidence = np.zeros((2, BINS))
    confidence[:, 2], confidence[:, 9] = [2.0, 2.8], [3.0, 3.5]  # means 0.16 and 0.65
    none = np.zeros(2, np.int64)
    counts = Tally(
        none,
        none,
        none,
        np.zeros(2),
        none,
        none,
        confidence,
        np.zeros((2, 0)),
        np.zeros((2, 0)),
        bins,
        right,
        bins,
        bins,
        bins,
        none,
    )
    assert calibration_error(counts) == pytest.approx((30 * abs(0.2 - 0.16) + 10 * abs(0.9 - 0.65)) / 40)
    low, high = reliability(counts)
    assert (low["targets"], high["targets"]) == (30, 10)
    assert low["confidence"] == pytest.approx(0.16)
    assert high["accuracy"] == 0.9


def test_intervals_are_those_of_means_of_sequences_drawn_anew():
    """Sequences of equal size: the bootstrap's standard error is the textbook's, s / √n."""
    random = np.random.default_rng(0)
    n, each = 400, 10
    losses = random.normal(2.0, 0.5, n)
    ones = np.ones(n, np.int64)
    zero = np.zeros((n, BINS))
    bins = np.zeros(BINS, np.int64)
    counts = Tally(
        np.arange(n),
        ones,
        each * ones,
        each * losses,
        ones,
        ones,
        zero,
        np.zeros((n, 0)),
        np.zeros((n, 0)),
        bins,
        bins,
        bins,
        bins,
        bins,
        bins,
    )
    found = intervals(counts, "top_5_accuracy", 2000, seed=3)
    low, high = found["loss"]
    error = losses.std() / math.sqrt(n)
    assert low == pytest.approx(losses.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(losses.mean() + 1.96 * error, abs=0.25 * error)
    assert found["perplexity"] == [math.exp(low), math.exp(high)]
    assert found == intervals(counts, "top_5_accuracy", 2000, seed=3)
    assert found["loss"] != intervals(counts, "top_5_accuracy", 2000, seed=4)["loss"]


def test_buckets_of_lengths_hold_every_sequence_once():
    counts = tally(list(range(60)))
    rows = by_length(counts)
    assert sum(row["sequences"] for row in rows) == 60
    assert sum(row["targets"] for row in rows) == counts.targets.sum()
    assert [(row["from"], row["to"]) for row in rows] == [(1, 32), (33, 64), (65, 128), (129, 256), (257, 512)]
    short = counts.tokens <= 32
    assert rows[0]["loss"] == pytest.approx(counts.loss[short].sum() / counts.targets[short].sum())


def test_recall_is_of_targets_and_precision_of_predictions():
    counts = tally([0])
    wanted, predicted, hits = np.array([8, 2, 0, 0]), np.array([4, 0, 6, 0]), np.array([3, 0, 0, 0])
    values = {item.name: getattr(counts, item.name) for item in fields(Tally)}
    values |= {"wanted": wanted, "predicted": predicted, "hits": hits}
    rows = by_token(Tally(**values), ["A", "C", "D", "E"])
    assert rows == {
        "A": {"targets": 8, "predicted": 4, "recall": 3 / 8, "precision": 3 / 4},
        "C": {"targets": 2, "predicted": 0, "recall": 0.0, "precision": None},
        "D": {"targets": 0, "predicted": 6, "recall": None, "precision": 0.0},
    }
