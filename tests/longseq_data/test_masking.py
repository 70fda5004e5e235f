import numpy as np
import pytest

from longseq_data.randomness import generator
from longseq_data.randomness import stream_words as WORDS
from longseq_data.samples.masking import mask_rows, mask_tokens, masked_count
from longseq_data.vocabulary import BOS, BYTES, EOS, IGNORE, MASK, PAD, RESIDUES, STANDARD, Vocabulary


def residues(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, RESIDUES, n).astype(np.uint8)


def test_generator_depends_on_all_of_its_arguments_and_on_nothing_else():
    draws = {
        what: generator(*what).random(4).tobytes()
        for what in [(1,), (2,), (1, 2), (1, "a"), (1, "a", 1), (1, "a", "1"), (1, "a1"), (12,), (1, "a", 12)]
    }
    assert len(set(draws.values())) == len(draws)
    assert generator(1, "a", 1).random(4).tobytes() == draws[1, "a", 1]
    assert generator(np.int64(1), "a", np.int64(1)).random(4).tobytes() == draws[1, "a", 1]


def test_generator_gives_the_same_numbers_for_ever():
    # A change here changes the data order of every run that is resumed.
    assert generator(1, "crop", 7).random(2).tolist() == pytest.approx([0.8258500541789543, 0.32777294815771363], abs=0)


@pytest.mark.parametrize(("n", "count"), [(0, 0), (1, 1), (6, 1), (10, 2), (11, 2), (20, 3), (1000, 150)])
def test_fifteen_percent_are_chosen_and_at_least_one(n: int, count: int):
    tokens = np.concatenate([[BOS], residues(n), [EOS], [PAD] * 3]).astype(np.uint8)
    inputs, targets = mask_tokens(tokens, 3, 1)
    chosen = targets != IGNORE
    assert chosen.sum() == count == masked_count(n)
    assert (targets[chosen] == tokens[chosen]).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    assert not chosen[tokens >= RESIDUES].any()


def test_masking_is_a_pure_function_of_tokens_seed_and_index():
    tokens = residues(203)
    before = tokens.copy()
    first = mask_tokens(tokens, 3, 1)
    assert (tokens == before).all()
    for a, b in zip(first, mask_tokens(tokens, 3, 1), strict=True):
        assert (a == b).all()
    for other in [(4, 1), (3, 2)]:
        assert (mask_tokens(tokens, *other)[1] != first[1]).any()


@pytest.mark.parametrize("together_rows", [1, 3, 64])
def test_a_row_is_masked_alike_whatever_stands_beside_and_behind_it(together_rows):
    lengths = np.random.default_rng(1).integers(1, 90, 64)
    rows = [np.concatenate([[BOS], residues(n, n), [EOS]]).astype(np.uint8) for n in lengths.tolist()]
    alone = [mask_tokens(row, 3, 7 * g) for g, row in enumerate(rows)]
    for first in range(0, 64, together_rows):
        some = range(first, min(first + together_rows, 64))
        batch = np.full((len(some), 93), PAD, dtype=np.int16)
        for i, g in enumerate(some):
            batch[i, : len(rows[g])] = rows[g]
        inputs, targets = mask_rows(batch, 3, np.array([7 * g for g in some]))
        for i, g in enumerate(some):
            size = len(rows[g])
            assert (inputs[i, :size] == alone[g][0]).all()
            assert (targets[i, :size] == alone[g][1]).all()
            assert (inputs[i, size:] == PAD).all()
            assert (targets[i, size:] == IGNORE).all()


def test_equal_random_words_leave_the_count_exact(monkeypatch):
    monkeypatch.setattr(
        "longseq_data.samples.masking.stream_words", lambda states, counters: WORDS(states, counters) % 3
    )
    tokens = np.full((50, 41), 5, dtype=np.uint8)
    assert ((mask_rows(tokens, 0, np.arange(50))[1] != IGNORE).sum(axis=1) == masked_count(41)).all()


def test_eighty_ten_ten_and_uniform_positions():
    n, rounds = 40, 40_000  # 6 of 40 each time: 240,000 chosen positions
    inputs, targets = mask_rows(np.full((rounds, n), 5, dtype=np.uint8), 0, np.arange(rounds))
    masked = targets != IGNORE
    assert (masked.sum(axis=1) == 6).all()
    seen = np.bincount(inputs[masked], minlength=29)
    chosen = rounds * 6
    # five standard deviations of a binomial
    assert abs(seen[MASK] / chosen - 0.8) < 5 * (0.8 * 0.2 / chosen) ** 0.5
    assert abs(seen[5] / chosen - (0.1 + 0.1 / 20)) < 5 * (0.105 * 0.895 / chosen) ** 0.5
    others = np.delete(seen[:STANDARD], 5) / chosen
    assert np.abs(others - 0.1 / 20).max() < 5 * (0.005 / chosen) ** 0.5
    assert seen[STANDARD:MASK].sum() == 0  # never a rare residue, BOS, EOS or PAD
    assert np.abs(masked.mean(axis=0) - 0.15).max() < 5 * (0.15 * 0.85 / rounds) ** 0.5
    # any two positions come together as often as others; of neighbouring samples they are independent
    together = (masked.T.astype(float) @ masked / rounds)[np.triu_indices(n, 1)]
    pair = 6 * 5 / (40 * 39)
    assert np.abs(together - pair).max() < 6 * (pair / rounds) ** 0.5
    following = masked[1:].T.astype(float) @ masked[:-1] / rounds
    assert np.abs(following - 0.15**2).max() < 6 * (0.15**2 / rounds) ** 0.5
    # what becomes of a position does not depend on which one it is
    hidden = np.array([(inputs[:, i][masked[:, i]] == MASK).mean() for i in range(n)])
    assert np.abs(hidden - 0.8).max() < 6 * (0.16 / (0.15 * rounds)) ** 0.5


@pytest.mark.parametrize(
    "vocabulary", [BYTES, Vocabulary("large", 70_000, 69_996, 69_997, 69_998, 69_999, 69_996, 60_000)]
)
def test_other_tokens_are_masked_by_their_own_vocabulary(vocabulary):
    n = 20_000
    ordinary = np.random.default_rng(0).integers(0, vocabulary.ordinary, n)
    tokens = np.concatenate([[vocabulary.bos], ordinary, [vocabulary.eos, vocabulary.pad]]).astype(vocabulary.dtype)
    inputs, targets = mask_tokens(tokens, 3, 1, vocabulary)
    chosen = np.flatnonzero(targets != IGNORE)
    assert inputs.dtype == vocabulary.dtype
    assert len(chosen) == masked_count(n) == 3000
    assert (targets[chosen] == tokens[chosen]).all()
    assert (tokens[chosen] < vocabulary.ordinary).all()
    masked = inputs[chosen] == vocabulary.mask
    assert abs(masked.mean() - 0.8) < 5 * (0.16 / 3000) ** 0.5
    replaced = chosen[(inputs[chosen] != tokens[chosen]) & ~masked]
    assert abs(len(replaced) / 3000 - 0.1) < 5 * (0.09 / 3000) ** 0.5 + 1 / 256
    assert (inputs[replaced] < vocabulary.replacements).all()
    assert inputs[replaced].max() > 0.98 * vocabulary.replacements  # of the whole range
