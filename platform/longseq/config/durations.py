"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import re

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_WORDS = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")
_NUMBER = re.compile(r"\d+(\.\d+)?")
# SLURM's own: minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
_CLOCK = re.compile(r"(\d+):(\d{1,2})(?::(\d{1,2}))?")
_DAYS = re.compile(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?")


def duration_seconds(text: str) -> float:
    """Seconds of "2h30m", "1d", "90s", or of a time as SLURM writes it: "90:00" (minutes and seconds), "2:30:00",
    "1-12" (days and hours), "1-12:30", "1-12:00:00".

    A number alone is refused: SLURM reads minutes, others seconds.

    Raises:
        ValueError: if it is none of these, or no time at all.
    """
    text = text.strip().lower()
    if _NUMBER.fullmatch(text) and float(text):
        raise ValueError(f"a number alone may mean minutes, as SLURM reads it, or seconds: write {text}m or {text}s")
    if days := _DAYS.fullmatch(text):
        total = _sum(days.groups(), "dhms")
    elif clock := _CLOCK.fullmatch(text):
        total = _sum(clock.groups(), "hms" if clock[3] else "ms")
    elif _WORDS.fullmatch(text):
        total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
    elif _NUMBER.fullmatch(text):
        total = 0.0
    else:
        raise ValueError("write a time as 2h30m, 1d, 90s, 2:30:00 or, in days and hours, 1-12:00:00")
    if not total:
        raise ValueError("there must be some time to train in")
    return total


def _sum(parts: tuple[str | None, ...], units: str) -> float:
    return float(sum(int(part or 0) * _UNITS[unit] for part, unit in zip(parts, units, strict=False)))
