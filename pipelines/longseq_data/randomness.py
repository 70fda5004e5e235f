"""Randomness as a pure function of (seed, what, counter): nothing random is kept, saved or handed on."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def generator(seed: int, *what: str | int) -> np.random.Generator:
    """A generator that depends on its arguments alone: the same on every rank, worker, machine and resume.

    ``generator(seed, "crop", 7)`` and ``generator(seed, "crop", 8)`` are independent streams: the 128-bit key of Philox
    (a counter-based generator) is the BLAKE2b hash of all arguments.

    Draw with ``.random()`` where the order must survive a NumPy upgrade: the other methods may change their algorithm
    between releases (NEP 19), while the doubles are the bits of Philox, scaled.
    """
    text = json.dumps([int(seed), *(part if isinstance(part, str) else int(part) for part in what)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
