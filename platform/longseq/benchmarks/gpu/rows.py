"""What a part of `longseq bench gpu` finds: rows, each written to a file as soon as it is known. No torch here."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        what: in words.
        seen: the number; None where nothing was measured, for the reason in ``note``.
        unit: of it.
        bar: what it is held against, e.g. "≤ 0.005"; empty for a number that only informs.
        met: whether it is met; None without a bar, or where nothing was measured.
    """

    what: str
    seen: float | None
    unit: str = ""
    bar: str = ""
    met: bool | None = None
    note: str = ""


class Rows:
    """Where a part's process writes its rows: a line of JSON each."""

    def __init__(self, path: Path):
        self._path = path
        path.touch()

    def add(
        self,
        what: str,
        seen: float,
        unit: str = "",
        *,
        most: float | None = None,
        least: float | None = None,
        note: str = "",
    ) -> None:
        """A number, held against the largest or the smallest it may be. NaN meets no bar."""
        bar, met = "", None
        if most is not None:
            bar, met = f"≤ {most:g}", bool(seen <= most)
        elif least is not None:
            bar, met = f"≥ {least:g}", bool(seen >= least)
        finite = math.isfinite(seen)  # JSON has no other numbers
        self._write(Row(what, float(seen) if finite else None, unit, bar, met, note if finite else f"{seen} {note}"))

    def failed(self, what: str, why: str) -> None:
        """Something that gave no number at all, and should have."""
        self._write(Row(what, None, met=False, note=why))

    def skipped(self, what: str, why: str) -> None:
        """Something that cannot be looked at here."""
        self._write(Row(what, None, note=f"skipped: {why}"))

    def _write(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a file that may be growing; none without a file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last end of a line, one may be half written
    return [Row(**json.loads(line)) for line in lines]


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
