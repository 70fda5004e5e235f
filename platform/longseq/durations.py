"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import re

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_WORDS = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def duration_seconds(text: str) -> float:
    """Seconds of "2h30m", "1d", "90s", "2:30:00", SLURM's "1-12:00:00", or of a plain number of seconds.

    Raises:
        ValueError: if it is none of these, or no time at all.
    """
    text = text.strip().lower()
    clock = _CLOCK.fullmatch(text)
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        total = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif _WORDS.fullmatch(text):
        total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        total = float(text)
    else:
        raise ValueError("write a time as 2h30m, 1d, 90s, 2:30:00 or in seconds")
    if not total:
        raise ValueError("there must be some time to train in")
    return total
