"""Numbers in text."""

from __future__ import annotations

import math


def number_in(text: str) -> float:
    """What a text says that is a number; NaN for any other: 1_0, which Python's ``float`` reads as 10, is a name."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
