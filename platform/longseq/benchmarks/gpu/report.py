"""The parts as a table for people: what was seen, next to the bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from longseq.benchmarks.gpu.rows import Row
from longseq.benchmarks.gpu.running import Found


def table(parts: Sequence[Found], about: Mapping[str, object], minutes: float) -> str:
    device = about["device"] if about["device"] != "cpu" else about["processor"]
    lines = [
        f"longseq bench gpu on {device}; torch {about['torch']}, triton {about['triton']}, {minutes:.1f} minutes",
        "",
    ]
    for found in parts:
        lines += [*_part(found), ""]
    return "\n".join([*lines, summary(parts)])


def head(found: Found) -> str:
    """How a part ended, in one line."""
    why = f": {found.why}" if found.why else ""
    return f"{found.part.name:<13}{found.state}, {found.seconds:.0f} s{why}"


def summary(parts: Sequence[Found]) -> str:
    bad = [found.part.name for found in parts if found.bad]
    missed = sum(row.met is False for found in parts if not found.part.correct for row in found.rows)
    broken = [found.part.name for found in parts if found.unfinished and not found.part.correct]
    words = f"wrong or not proved: {', '.join(bad)}" if bad else "nothing is wrong"
    words += f"; not measured: {', '.join(broken)}" if broken else ""
    return f"{words}; bars of speed that are missed: {missed}"


def _part(found: Found) -> Iterator[str]:
    yield f"{head(found)}  ({found.part.about})"
    if found.rows:
        yield f"    {'seen':>14}  {'bar':<10}"
    yield from map(_row, found.rows)


def _row(row: Row) -> str:
    seen = "–" if row.seen is None else f"{_digits(row.seen)} {row.unit}".strip()
    verdict = {True: "met", False: "NOT MET", None: ""}[row.met]
    note = f" ({row.note})" if row.note else ""
    return f"    {seen:>14}  {row.bar:<10}{verdict:<9}{row.what}{note}"


def _digits(x: float) -> str:
    if x == 0 or 0.01 <= abs(x) < 1000:
        return f"{x:.3g}"
    return f"{x:.1e}" if abs(x) < 0.01 else f"{x:,.0f}"
