"""Which rank is the slowest by itself, and when it is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from longseq.config.schema import Config
from longseq.training.callbacks.stragglers import Slowest, Stragglers, slowest


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # data, forward, write, share in storage
        ((0.1, 5.0, 0.0, 0.0), (3, "its device")),
        ((4.0, 1.0, 0.0, 0.1), (3, "data")),
        ((4.0, 1.0, 0.0, 0.9), (3, "storage")),
        ((0.1, 1.0, 9.9, 0.0), (3, "storage")),
        ((0.0, 0.1, 0.0, 0.0), (2, "its device")),
    ],
)
def test_the_rank_that_needs_longest_by_itself_is_found_with_the_reason(row, expected):
    found = slowest([(0.1, 0.9, 0.0, 0.0), (0.1, 1.0, 0.0, 0.0), (0.1, 1.1, 0.0, 0.0), row])
    own = [1.0, 1.1, 1.2, sum(row[:-1])]
    usual = sorted(own)[1]
    assert (found.rank, found.cause) == expected
    assert found.ratio == pytest.approx(max(own) / usual)
    assert found.excess == pytest.approx(max(own) - usual)


def test_of_two_ranks_the_faster_one_is_the_measure():
    assert slowest([(0.0, 1.0, 0.0, 0.0), (0.0, 5.0, 0.0, 0.0)]) == Slowest(1, 5.0, 4.0, "its device")


def test_nothing_is_measured_yet():
    assert slowest([(0.0, 0.0, 0.0, 0.0)] * 2).ratio == 1.0


def test_it_is_said_once_after_three_points_and_when_it_is_over(capsys):
    callback = Stragglers(Config(), SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    callback.names = ["n1: rank 0 (cpu)", "n2: rank 1 (cuda:3)"]
    slow, other = Slowest(1, 5.04, 4.0, "data"), Slowest(0, 3.0, 2.0, "data")
    for found in (slow, slow, other, slow, slow):
        callback._judge(found, True)
    assert capsys.readouterr().err == ""
    for _ in range(5):
        callback._judge(slow, True)
    assert capsys.readouterr().err == (
        "longseq: warning: n2: rank 1 (cuda:3) is 5.0 times as slow as the others, which wait for it: most of it is "
        "data (trainer.slow_factor).\n"
    )
    callback._judge(slow, False)
    callback._judge(slow, False)
    assert capsys.readouterr().err == "longseq: all ranks are about as fast as each other again.\n"


@pytest.mark.parametrize(
    ("ratio", "excess", "passed", "expected"),
    [(1.6, 1.0, 3.0, True), (1.4, 1.0, 3.0, False), (9.0, 0.2, 0.3, False), (2.0, 1.0, 30.0, False)],
    ids=["slow", "hardly slower", "short steps", "a small part of the time"],
)
def test_what_nobody_would_notice_is_not_said(ratio, excess, passed, expected):
    callback = Stragglers(Config(), SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    assert callback._matters(Slowest(1, ratio, excess, "data"), passed) is expected
