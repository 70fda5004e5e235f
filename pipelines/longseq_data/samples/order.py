"""The stateless order of a corpus: which record is sample g, computed for any g without a table.

An epoch is a permutation of [0, n) drawn by (seed, epoch): a Feistel network over the smallest power of two that is not
below n, walked along its cycles until the value falls below n (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). It takes constant memory, and each value takes less than two walks on average.

Sample g of the endless order is position g % n of epoch g // n, and belongs to rank g mod world. So the only state of a
run is the number of samples consumed, whatever the number of ranks and workers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import generator, hashed, mixed

ROUNDS = 8  # four of each half
TABLE_LIMIT = 1 << 10  # below, halves of a few bits cannot shuffle well, and a table costs nothing

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Permutation:
    """A bijection of [0, n), a pure function of (n, seed, epoch). Made by ``permutation``."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n < 1 << 63:
            raise ValueError(f"a permutation needs 1 <= n < 2^63, not n = {n}")
        self.n = n
        self._table: Integers | None = None
        if n <= TABLE_LIMIT:
            self._table = np.argsort(generator(seed, "order", n, epoch).random(n), kind="stable").astype(np.int64)
            return
        bits = (n - 1).bit_length()
        self._right_bits = np.uint64(bits // 2)
        self._right_mask = np.uint64((1 << bits // 2) - 1)
        # what is left of 64 bits after these shifts fits the left and the right half
        self._shifts = np.uint64(64 - (bits - bits // 2)), np.uint64(64 - bits // 2)
        self._keys = np.frombuffer(hashed(8 * ROUNDS, seed, "order", n, epoch), dtype="<u8")

    def __call__(self, indices: npt.ArrayLike) -> Integers:
        """Values at ``indices``, integers in [0, n) of any shape: int64 of the same shape.

        Ask for thousands at once: the time of a call is that of NumPy's hundred small steps until then.

        Raises ValueError for an index outside [0, n).
        """
        given = np.asarray(indices, dtype=np.int64)
        if given.size and (given.min() < 0 or given.max() >= self.n):
            raise ValueError(f"indices must lie in [0, {self.n}), not {given.min()} to {given.max()}")
        if self._table is not None:
            return self._table[given]
        values = self._shuffled(given.ravel().astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._shuffled(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64).reshape(given.shape)

    def _shuffled(self, values: Words) -> Words:
        left, right = values >> self._right_bits, values & self._right_mask
        for first in range(0, ROUNDS, 2):
            left ^= mixed(right ^ self._keys[first]) >> self._shifts[0]
            right ^= mixed(left ^ self._keys[first + 1]) >> self._shifts[1]
        return (left << self._right_bits) | right


# An endless order comes back to the same epoch with every batch. Typed: 3.0 must not find what 3 has left.
@lru_cache(maxsize=16, typed=True)
def permutation(n: int, seed: int, epoch: int) -> Permutation:
    """The order of epoch ``epoch`` over n records. Raises ValueError unless 1 <= n < 2^63."""
    return Permutation(n, seed, epoch)


def endless_order(samples: npt.ArrayLike, n: int, seed: int) -> Integers:
    """The record of each sample number, int64 of the same shape: epoch g // n, position g % n.

    Raises ValueError for a negative sample number.
    """
    given = np.asarray(samples, dtype=np.int64)
    if given.size and given.min() < 0:
        raise ValueError(f"sample numbers start at 0, not at {given.min()}")
    epochs, positions = np.divmod(given, n)
    records = np.empty_like(given)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        records[here] = permutation(n, seed, epoch)(positions[here])
    return records


def samples_of_rank(first: int, count: int, rank: int, world: int) -> Integers:
    """The numbers in [first, first + count) of the samples of ``rank``: those that are rank mod world, ascending."""
    return np.arange(first + (rank - first) % world, first + count, world, dtype=np.int64)
