"""The table of an experiment: means over seeds, their spread, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from longseq.experiments.plan import Plan

Found = Mapping[str, Mapping[str, Any]]


def report(plan: Plan, found: Found, facts: str) -> str:
    """Markdown: our table, the curve if there is one, the paper's table, and what differs."""
    parts = [f"# {plan.name}", plan.about, facts, _ours(plan, found)]
    if plan.curve:
        parts.append(_curves(plan, found))
    if plan.paper:
        parts += ["## The paper (arXiv 2009.14794)", _papers(plan)]
    if plan.differs:
        parts += ["## What differs", plan.differs]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ours(plan: Plan, found: Found) -> str:
    columns = [(group, split) for group in plan.groups for split in plan.splits]
    rows = [["accuracy % / perplexity", *(f"{group} {split}" for group, split in columns), "seeds"]]
    base = [_baseline(found, group, split) for group, split in columns]
    if any(cell != "–" for cell in base):
        rows.append(["empirical baseline", *base, ""])
    for name in plan.variants:
        mine = [r for r in found.values() if r["variant"] == name]
        for key, label in (("before", f"{name}, before training"), ("splits", name)):
            cells = [
                _cell([r[key][split] for r in _of(mine, group) if split in r.get(key, {})]) for group, split in columns
            ]
            if any(cell != "–" for cell in cells):
                rows.append([label, *cells, str(len({r["seed"] for r in mine}))])
    note = "Means over seeds; ± half of the distance between the largest and the smallest."
    return f"{markdown(rows)}\n\n{note}"


def _curves(plan: Plan, found: Found) -> str:
    """Validation accuracy in per cent against the step, a column a variant and group."""
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in found.values():
        points = curves.setdefault((r["variant"], r["group"]), {})
        for step, value in r["curve"].items():
            points.setdefault(int(step), []).append(100 * value)
    order = [(name, group) for group in plan.groups for name in plan.variants if (name, group) in curves]
    heads = [f"{name}, {group}" if len(plan.groups) > 1 else name for name, group in order]
    steps = sorted({step for points in curves.values() for step in points})
    rows = [["validation accuracy %, step", *heads]]
    rows += [[f"{step:,}", *(_mean(curves[name].get(step, [])) for name in order)] for step in steps]
    return markdown(rows) if steps else ""


def _papers(plan: Plan) -> str:
    if not isinstance(plan.paper, dict):
        return str(plan.paper)
    columns = [(group, split) for group in plan.paper for split in next(iter(plan.paper[group].values()))]
    names = dict.fromkeys(name for group in plan.paper.values() for name in group)
    rows = [["accuracy % / perplexity", *(f"{group} {split}" for group, split in columns)]]
    for name in names:
        cells = (plan.paper[group].get(name, {}).get(split) for group, split in columns)
        rows.append([name, *(f"{cell[0]:.2f} / {cell[1]:.2f}" if cell else "–" for cell in cells)])
    return markdown(rows)


def _of(rows: Sequence[Mapping[str, Any]], group: str) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["group"] == group]


def _baseline(found: Found, group: str, split: str) -> str:
    scores = (r["splits"].get(split, {}).get("baseline") for r in _of(list(found.values()), group))
    known = [base for base in scores if base]
    return _cell(known[:1])


def _cell(scores: Sequence[Mapping[str, float]]) -> str:
    if not scores:
        return "–"
    accuracies, perplexities = (
        [s[key] * factor for s in scores] for key, factor in (("accuracy", 100), ("perplexity", 1))
    )
    return f"{_mean(accuracies)} / {_mean(perplexities)}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the head, as a table."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
