"""The regression on letters, against its closed form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from longseq.evaluation.letters import ridge_on_letters


def drawn(count: int, length: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 20, (count, length)).astype(np.uint8))


def one_hot(rows: list[np.ndarray]) -> np.ndarray:
    return np.eye(20)[np.stack(rows)].reshape(len(rows), -1)


@pytest.mark.parametrize(("count", "length"), [(30, 4), (90, 3)])
def test_the_ridge_with_the_least_leave_one_out_error_gives_the_numbers(count, length):
    train, others, rng = drawn(count, length, 1), drawn(7, length, 2), np.random.default_rng(3)
    numbers = one_hot(train) @ rng.normal(size=20 * length) + 0.3 * rng.normal(size=count)

    def fitted(rows: np.ndarray, y: np.ndarray, ridge: float, to: np.ndarray) -> np.ndarray:
        center = rows.mean(0)
        x = rows - center
        weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (y - y.mean()))
        return (to - center) @ weights + y.mean()

    errors = {}
    for ridge in 10.0 ** np.arange(-2, 5):
        left = [np.arange(count) != one for one in range(count)]
        x = one_hot(train)
        errors[ridge] = sum(float(fitted(x[w], numbers[w], ridge, x[~w])[0] - numbers[~w][0]) ** 2 for w in left)
    best = min(errors, key=errors.get)
    wanted = fitted(one_hot(train), numbers, best, one_hot(others))
    np.testing.assert_allclose(ridge_on_letters(train, numbers, others), wanted, rtol=1e-6, atol=1e-8)


def test_letters_say_nothing_of_sequences_of_other_lengths_or_tokens_of_text():
    train, numbers = drawn(5, 3, 1), np.arange(5.0)
    assert ridge_on_letters(train, numbers, drawn(2, 4, 2)) is None
    assert ridge_on_letters([each.astype(np.uint16) + 300 for each in train], numbers, []) is None
    assert ridge_on_letters([], numbers[:0], train) is None
    unseen = [np.full(3, 24, np.uint8)] * 2  # at no place a letter that was there
    assert np.ptp(ridge_on_letters(train, numbers, unseen)) == 0


def test_mutants_at_places_that_never_varied_are_told_alike_to_the_last_bit():
    rng = np.random.default_rng(5)
    train, others = np.tile(rng.integers(0, 20, 55).astype(np.uint8), (2, 700, 1))
    for _ in range(2):
        train[np.arange(700), rng.integers(0, 29, 700)] = rng.integers(0, 20, 700)
        others[np.arange(700), rng.integers(29, 55, 700)] = rng.integers(0, 20, 700)
    found = ridge_on_letters(list(train), rng.normal(size=700), list(others))
    assert np.unique(others, axis=0).shape[0] > 100
    assert np.ptp(found) == 0
    same = [train[0]] * 4
    assert ridge_on_letters(same, np.arange(4.0), same).tolist() == [1.5] * 4


def test_an_evaluation_has_the_regression_next_to_the_model(tuned, longseq, folder):
    rng = np.random.default_rng(4)
    rows = ["".join(rng.choice(list("ACDE"), size=6)) for _ in range(80)]
    lines = [f"{row},{row.count('A') + 0.1 * (row[2] == 'C')}" for row in dict.fromkeys(rows)]
    Path("table.csv").write_text("\n".join(["sequence,share", *lines, ""]))  # in the place of the fixture's
    run = tuned("share", "head").path
    splits = json.loads(longseq("evaluate", run, "--split", "test", "--json", "--bootstrap", 20))["splits"]
    assert splits["test"]["ridge_on_letters"]["spearman"] > 0.95 > splits["test"]["spearman"]
    assert splits["test"]["ridge_on_letters"]["sequences"] == splits["test"]["sequences"]
    assert re.search(
        r"\nridge on one-hot letters +test +\d+ +\d+  spearman +0.9",
        longseq("evaluate", run, "--split", "test", "--bootstrap", 0),
    )
