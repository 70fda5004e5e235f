"""Randomness as a pure function of (seed, what, counter): nothing random is kept, saved or handed on."""

from __future__ import annotations

import hashlib
import json
import operator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt


def generator(seed: int, *what: str | int) -> np.random.Generator:
    """A generator that depends on its arguments alone: the same on every rank, worker, machine and resume.

    ``generator(seed, "crop", 7)`` and ``generator(seed, "crop", 8)`` are independent streams: the 128-bit key of Philox
    (a counter-based generator) is the BLAKE2b hash of all arguments.

    Draw with ``.random()`` where the order must survive a NumPy upgrade: the other methods may change their algorithm
    between releases (NEP 19), while the doubles are the bits of Philox, scaled.
    """
    digest = hashed(16, seed, *what)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def hashed(size: int, seed: SupportsIndex, *what: SupportsIndex | str) -> bytes:
    """``size`` bytes, a function of the values alone: an integer of NumPy or PyTorch gives what Python's gives.

    Raises TypeError for a number that is not an integer: 3.7 would be 3, and True 1, without a word.
    """

    text = json.dumps([_index(seed), *(part if isinstance(part, str) else _index(part) for part in what)])
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _index(number: SupportsIndex) -> int:
    if isinstance(number, (bool, np.bool_)):
        raise TypeError(f"random numbers are a function of integers and texts, not of {number!r}")
    return operator.index(number)


def uniforms(seed: int, what: str, counters: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each counter, of the shape of ``counters``: as generator(...).random(), for millions."""
    return ((words(seed, what, counters) >> np.uint64(11)) * np.float64(2.0**-53)).reshape(np.shape(counters))


def words(seed: int, what: str, counters: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """64 random bits for each counter: number k of the stream whose state is a hash of (seed, what)."""
    digest = hashed(8, seed, "uniforms", what)
    return stream_words(np.uint64(int.from_bytes(digest, "big")), counters)


def stream_words(states: npt.ArrayLike, counters: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Number ``counters`` of the SplitMix64 stream (Steele, Lea and Flood, OOPSLA 2014) that begins at ``states``.

    Both broadcast. States that are themselves such words begin streams that are independent of each other.
    """
    steps = (np.atleast_1d(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(steps + np.asarray(states, dtype=np.uint64))


def mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser, in place: every bit depends on every bit."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
