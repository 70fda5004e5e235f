"""Numbers that options take, checked where they are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from longseq_data.numbers import number_in


def at_least(least: int) -> Callable[[str], int]:
    """A whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


positive, natural = at_least(1), at_least(0)


def naturals(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(natural(part) for part in text.split(","))


def real(text: str) -> float:
    """A number from 0 on."""
    value = number_in(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = number_in(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    value = number_in(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value
