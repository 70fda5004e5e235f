"""The order of samples: a bijection, a function of (seed, epoch), even, and the same for ever."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_data.randomness import generator, uniforms
from longseq_data.samples.order import TABLE_LIMIT, Permutation, endless_order, permutation, samples_of_rank

SIZES = [1, 2, 3, 4, 5, 7, 31, 32, 33, 127, 1009]
SIZES += [TABLE_LIMIT - 1, TABLE_LIMIT, TABLE_LIMIT + 1, 1031, 2047, 2048, 2049, 4095, 4096, 4097, 65537, 99_991]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3)])
def test_every_record_comes_once_an_epoch(n, seed, epoch):
    assert np.array_equal(np.sort(permutation(n, seed, epoch)(np.arange(n))), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 20_000), seed=st.integers(0, 2**64), epoch=st.integers(0, 2**40))
def test_every_record_comes_once_whatever_the_arguments(n, seed, epoch):
    values = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.bincount(values, minlength=n), np.ones(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(TABLE_LIMIT + 1, 2**63 - 1), start=st.integers(0, 2**63 - 1), seed=st.integers(0, 9))
def test_values_of_huge_orders_are_different_and_in_range(n, start, seed):
    positions = (start + np.arange(300, dtype=object)) % n
    values = Permutation(n, seed, 1)(positions.astype(np.int64))
    assert values.dtype == np.int64
    assert values.min() >= 0
    assert values.max() < n
    assert len(set(values.tolist())) == 300


def test_a_trillion_records_take_no_table():
    n = 2**40 + 1
    tracemalloc.start()
    values = Permutation(n, 5, 0)(np.arange(n - 1000, n))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(set(values.tolist())) == 1000


@pytest.mark.parametrize("n", [5, 1000, 1025, 70_000])
def test_one_at_a_time_gives_what_an_array_gives(n):
    order = permutation(n, 2, 9)
    positions = np.arange(0, n, max(1, n // 57))
    together = order(positions)
    assert [int(order(int(position))) for position in positions] == together.tolist()
    assert np.array_equal(order(positions[:4].reshape(2, -1)), together[:4].reshape(2, -1))
    assert order(np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize("n", [1000, 5003, 2**20])
def test_another_seed_epoch_or_size_gives_another_order(n):
    positions = np.arange(1000)
    first = Permutation(n, 1, 1)(positions)
    for other in (Permutation(n, 1, 2), Permutation(n, 2, 1), Permutation(n, 0, 1), Permutation(n + 1, 1, 1)):
        # two random orders agree in one of n places; 8 is beyond any chance
        assert (other(positions) == first).sum() <= 8
    assert np.array_equal(Permutation(n, 1, 1)(positions), first)


def excess(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square of equal expectations lies above its mean."""
    counts = np.asarray(counts, dtype=np.float64).ravel()
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    freedom = counts.size - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def test_all_orders_of_four_records_are_equally_frequent():
    orders = [tuple(Permutation(4, 3, epoch)(np.arange(4)).tolist()) for epoch in range(6000)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == math.factorial(4)
    assert abs(excess(np.array(counts))) < 4


@pytest.mark.parametrize("n", [1025, 1500, 2047, 5000, 2**17])
def test_positions_and_values_are_unrelated(n):
    """16 x 16 cells of (where it was, where it went), and of (value, next value), filled evenly over many epochs."""
    places, steps = np.zeros((16, 16)), np.zeros((16, 16))
    for epoch in range(max(8, 200_000 // n)):
        cells = Permutation(n, 11, epoch)(np.arange(n)) * 16 // n
        np.add.at(places, (np.arange(n) * 16 // n, cells), 1)
        np.add.at(steps, (cells[:-1], cells[1:]), 1)
    # the cells of a permutation are more even than independent draws: a lower bound would fail rightly
    assert excess(places) < 4
    assert excess(steps) < 4


def test_each_record_is_first_equally_often():
    n, epochs = 1200, 12_000
    first = [int(Permutation(n, 17, epoch)(0)) for epoch in range(epochs)]
    assert abs(excess(np.bincount(first, minlength=n))) < 4


def test_successive_differences_are_not_small():
    values = Permutation(100_000, 0, 0)(np.arange(100_000))
    near = (np.abs(np.diff(values)) < 100).mean()
    assert 0.001 < near < 0.003  # 2 x 99 of 100,000


def test_the_order_of_today_is_the_order_of_all_days():
    """These values decide what a resumed run trains on: a change of them must be meant, and said."""
    assert permutation(10, 0, 0)(np.arange(10)).tolist() == [5, 0, 2, 9, 8, 4, 7, 1, 6, 3]
    assert permutation(1025, 1, 2)(np.arange(8)).tolist() == [634, 48, 350, 764, 625, 1002, 142, 942]
    assert permutation(68_000_000, 42, 7)(np.arange(6)).tolist() == [
        21182349,
        56525930,
        60869098,
        26719362,
        27096358,
        27175168,
    ]
    assert permutation(2**40, 3, 0)([0, 1, 2**40 - 1]).tolist() == [680881819005, 180779787389, 971885051468]


def test_the_endless_order_is_one_epoch_after_another():
    n = 1030
    whole = np.concatenate([permutation(n, 6, epoch)(np.arange(n)) for epoch in range(3)])
    assert np.array_equal(endless_order(np.arange(3 * n), n, 6), whole)
    scattered = np.array([[3 * n - 1, 0], [n, n - 1]])
    assert np.array_equal(endless_order(scattered, n, 6), whole[scattered])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 5, 12])
def test_ranks_share_the_samples(world, first):
    shares = [samples_of_rank(first, 20, rank, world) for rank in range(world)]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(first, first + 20))
    for rank, share in enumerate(shares):
        assert (share % world == rank).all()


def test_what_lies_outside_is_refused():
    for n in (0, -1, 2**63):
        with pytest.raises(ValueError, match="1 <= n"):
            permutation(n, 0, 0)
    for n in (10, 5000):
        for index in (-1, n):
            with pytest.raises(ValueError, match=rf"\[0, {n}\)"):
                permutation(n, 0, 0)(index)
    with pytest.raises(ValueError, match="start at 0"):
        endless_order([3, -1], 10, 0)


@pytest.mark.parametrize("convert", [np.int64, np.uint16, np.array])
def test_random_numbers_depend_on_the_values_of_integers_and_not_on_their_types(convert):
    seed, what, n = convert(3), convert(7), convert(5000)
    assert (generator(seed, "crop", what).random(5) == generator(3, "crop", 7).random(5)).all()
    assert (uniforms(seed, "crop", np.arange(4)) == uniforms(3, "crop", np.arange(4))).all()
    assert (Permutation(int(n), seed, what)(range(9)) == Permutation(5000, 3, 7)(range(9))).all()


@pytest.mark.parametrize("seed", [3.0, 3.7, True, "3", None])
def test_a_seed_that_is_no_integer_is_refused_and_not_rounded(seed):
    permutation(5000, 1, 0), permutation(5000, 3, 0)
    for draw in (
        lambda: generator(seed, "crop"),
        lambda: uniforms(seed, "crop", [0]),
        lambda: permutation(5000, seed, 0),
    ):
        with pytest.raises(TypeError):
            draw()
