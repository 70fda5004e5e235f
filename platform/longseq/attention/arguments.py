"""What attention may be asked for: one check of each kind of argument, for all ways into the package."""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import torch

LARGEST = 2**63 - 1


def integer(name: str, value: SupportsIndex, least: int = 0) -> int:
    """A plain int of whatever is one: Python's, NumPy's, or a tensor of one integer. 3.0 and True are none.

    Raises:
        TypeError: for anything else.
        ValueError: below ``least`` or above 2^63 − 1.
    """
    if type(value) is not int:
        is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
        try:
            number = None if is_bool else operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None:
            raise TypeError(f"{name} must be an integer, got {value!r}, a {type(value).__name__}")
        value = int(number)
    if not least <= value <= LARGEST:
        raise ValueError(f"{name} must be an integer from {least} to 2^63 - 1, got {value}")
    return value


def hashed(size: int, *what: SupportsIndex | str) -> int:
    """An integer of ``size`` bytes: neighbouring seeds, layers and steps give unrelated ones.

    It depends on the values of ``what`` alone: an integer of NumPy gives what Python's gives.
    """
    plain = tuple(x if isinstance(x, str) else integer("what a seed is made of", x) for x in what)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=size).digest(), "big")
