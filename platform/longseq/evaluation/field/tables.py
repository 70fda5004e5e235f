"""Comma-separated files with a header, as ProteinGym distributes them. No torch here."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from longseq.errors import LongseqError
from longseq_data.numbers import number_in
from longseq_data.os_errors import explained

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a sequence is one field


def columns(path: Path) -> tuple[str, ...]:
    """The names in a file's first line.

    Raises:
        LongseqError: for a file that cannot be read as text, and two columns of one name.
    """
    names = tuple(name.strip() for name in next(_lines(path), (0, ()))[1])
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise LongseqError(f"{path}: two columns are called {twice}; remove one of them.")
    return names


def rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """``FILE, line N`` and the fields by column of each line after the first; empty lines are skipped.

    Raises:
        LongseqError: for a file that cannot be read as text, and a line with another number of fields; naming it.
    """
    names = columns(path)
    for number, fields in islice(_lines(path), 1, None):
        if not fields:
            continue
        place = f"{path}, line {number}"
        if len(fields) != len(names):
            raise LongseqError(f"{place}: {len(fields)} fields, but the header has {len(names)}; correct the line.")
        yield place, dict(zip(names, fields, strict=True))


def number(row: dict[str, str], column: str, place: str) -> float:
    """A field that must be a finite number."""
    text = row[column]
    value = number_in(text)
    if not math.isfinite(value):
        raise LongseqError(f"{place}: {column} is {text!r}, which is no number; correct it, or leave the line out.")
    return value


def _lines(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)  # else a quote that is not closed takes all lines that follow
            for fields in reader:
                yield reader.line_num, tuple(fields)
    except OSError as error:
        raise LongseqError(f"{explained(error, path, 'cannot be read')}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        why = f" ({error})" if isinstance(error, csv.Error) else ""
        raise LongseqError(f"{path}: no table of text with commas{why}; give a CSV file.") from None
