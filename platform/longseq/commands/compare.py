"""Runs next to each other: the keys in which they differ, their losses and speed, and what `longseq evaluate` has kept.

A column per run. Scores are those of a run's newest evaluated step, with its own settings.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from longseq.evaluation.compare import compare, rows
from longseq.printed import as_json

_WIDEST = 48  # letters of a cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    found = compare(args.runs)
    if args.json:
        print(as_json([asdict(one) for one in found], indent=1))
        return 0
    lines = [(name, [_short(cell) for cell in cells]) for name, cells in rows(found)]
    names = max(len(name) for name, _ in lines)
    widths = [max(len(cells[i]) for _, cells in lines if cells) for i in range(len(found))]
    for name, cells in lines:
        print("  ".join([f"{name:<{names}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False))]).rstrip())
    return 0


def _short(cell: str) -> str:
    return cell if len(cell) <= _WIDEST else f"…{cell[1 - _WIDEST :]}"
