"""Quotation marks of tables that were not closed: a cell that has taken the rows below it."""

from __future__ import annotations

import csv
import io
import sys

from .sources import open_binary


def may_swallow(cell: str, delimiter: str, width: int) -> bool:
    """Whether a line inside a cell may be a row of the table."""
    return "\n" in cell and any(line.count(delimiter) >= width - 1 for line in cell.split("\n")[1:])


def swallows(cell: str, delimiter: str, width: int, place: int) -> bool:
    """Whether all lines are rows, up to the column of the mark that closes the cell: as many fields, and not as prose
    has commas."""
    inner, last = cell.split("\n")[1:-1], cell.split("\n")[-1]
    prose = delimiter != "\t" and f"{delimiter} " in cell
    return not prose and last.count(delimiter) == place and all(line.count(delimiter) == width - 1 for line in inner)


def all_closed(source: str, delimiter: str) -> bool:
    """Whether each cell in quotation marks ends with its own: one that is not closed takes the next mark."""
    limit = csv.field_size_limit(sys.maxsize)  # of all readers of this process
    try:
        with open_binary(source, "text") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
            for _ in csv.reader(text, delimiter=delimiter, strict=True):
                pass
    except csv.Error:
        return False
    finally:
        csv.field_size_limit(limit)
    return True
