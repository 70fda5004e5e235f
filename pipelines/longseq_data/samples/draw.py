"""Which source sample number n of a mixture comes from, and which sample of that source it is: a function of n alone.

Source of n: where x(n) falls when [0, 1) is cut into pieces as long as the weights. x(n) = n' φ + c modulo 1, with the
golden ratio φ, c by the seed, and n' = n but for the order inside blocks of BLOCK numbers, which is a random
permutation. Multiples of φ fill [0, 1) as evenly as any sequence can (Niederreiter, "Random Number Generation and
Quasi-Monte Carlo Methods", 1992, section 3.1), so after N samples each source has had its share of them but for a few
and those of one block. How many it has had is counted by the sum of floor((a i + b) / m), in O(log m) steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import hashed

from .order import permutation

Integers = npt.NDArray[np.int64]
Borders = npt.NDArray[np.uint64]
Counts = list[int]

BLOCK = 1 << 10
STEP = 0x9E3779B97F4A7C15  # φ - 1, of WHOLE
WHOLE = 1 << 64


class Draw:
    """Weights of sources, and those they had before: (up to which sample number, weights), in that order."""

    def __init__(self, seed: int, weights: Sequence[float], before: Sequence[tuple[int, Sequence[float]]] = ()) -> None:
        self._seed = seed
        self._begin = int.from_bytes(hashed(8, seed, "mixture"), "big")
        self._ends = [until for until, _ in before]
        self._borders = [_borders(some) for some in (*(some for _, some in before), weights)]

    def sources(self, first: int, until: int) -> Integers:
        """Those of the samples [first, until)."""
        x = self._places(first, until)
        found = np.empty(until - first, dtype=np.int64)
        for low, high, borders in zip([0, *self._ends], [*self._ends, until], self._borders, strict=True):
            here = slice(max(0, low - first), max(0, high - first))
            found[here] = np.searchsorted(borders[:-1], x[here], "right")
        return found

    def counts(self, n: int) -> Counts:
        """How many of the first n samples each source has."""
        total = np.zeros(len(self._borders[0]), dtype=np.int64)
        for low, high, borders in zip([0, *self._ends], [*self._ends, n], self._borders, strict=True):
            total += self._counts(borders, min(high, n)) - self._counts(borders, min(low, n))
        return total.tolist()

    def _counts(self, borders: Borders, n: int) -> Integers:
        """As if these borders had held from the beginning."""
        whole = n - n % BLOCK
        below = [0, *(_below(border, whole, self._begin) for border in borders[:-1].tolist()), whole]
        rest = np.searchsorted(borders[:-1], self._places(whole, n), "right")
        return np.diff(below) + np.bincount(rest, minlength=len(borders))

    def _places(self, first: int, until: int) -> npt.NDArray[np.uint64]:
        """x of the numbers [first, until), of WHOLE."""
        numbers = np.arange(first, until)
        for block in range(first // BLOCK, -(-until // BLOCK)):
            here = slice(max(0, block * BLOCK - first), (block + 1) * BLOCK - first)
            numbers[here] = block * BLOCK + permutation(BLOCK, self._seed, block)(numbers[here] - block * BLOCK)
        return numbers.astype(np.uint64) * np.uint64(STEP) + np.uint64(self._begin)


def _borders(weights: Sequence[float]) -> Borders:
    """Where the piece of each source ends, of WHOLE; of the last one at its end."""
    exact = [Fraction(weight) for weight in weights]
    return np.array([min(int(end * WHOLE / sum(exact)), WHOLE - 1) for end in accumulate(exact)], dtype=np.uint64)


def _below(border: int, n: int, begin: int) -> int:
    """How many of the first n multiples of STEP, from ``begin`` on, are below ``border`` modulo WHOLE."""
    return n + _floors(n, begin) - _floors(n, begin + WHOLE - border)


def _floors(n: int, begin: int) -> int:
    """Σ floor((STEP i + begin) / WHOLE) over i in [0, n): the points below a line, by Euclid's steps."""
    total, a, b, m = 0, STEP, begin, WHOLE
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, a, m = top // m, top % m, m, a
    return total
