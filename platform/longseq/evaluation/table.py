"""Evaluations as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

# What some data have besides: key of the report -> column of the table.
_EXTRA = {
    "bits_per_byte": "bits per byte",
    "word_perplexity": "word perplexity",
    "bits_per_dimension": "bits per dimension",
}
_TOKENS = 30  # of a large vocabulary, the most frequent ones are shown


def table(reports: Sequence[Report]) -> str:
    """A line for each checkpoint and split."""
    several = len(reports) > 1
    rows = [(report, name, values) for report in reports for name, values in report["splits"].items()]
    near = next(key for key in rows[0][2] if key.startswith("top_"))
    names = max(5, *(len(name) for _, name, _ in rows))
    models = max(len(_model(report)) for report in reports)
    intervals = any("intervals" in values for _, _, values in rows)
    extra = {key: title for key, title in _EXTRA.items() if any(key in values for _, _, values in rows)}

    head = f"{'model':<{models}}  " if several else ""
    head += f"{'split':<{names}}{'sequences':>11}{'targets':>12}{'loss':>9}"
    head += f"{'95 % interval':>17}" if intervals else ""
    head += f"{'perplexity':>12}{'bits':>8}{'accuracy':>10}{near[:-9].replace('_', '-'):>8}{'ECE':>7}"
    head += f"{'baseline perplexity':>21}{'accuracy':>10}"
    head += "".join(f"{title:>{len(title) + 3}}" for title in extra.values())
    lines = [head]
    for report, name, values in rows:
        line = f"{_model(report):<{models}}  " if several else ""
        line += f"{name:<{names}}{values['sequences']:>11,}{values['targets']:>12,}{values['loss']:>9.4f}"
        if intervals:
            low, high = values["intervals"]["loss"]
            line += f"{f'{low:.4f}–{high:.4f}':>17}"
        line += f"{values['perplexity']:>12.2f}{values['bits']:>8.4f}{values['accuracy']:>10.1%}{values[near]:>8.1%}"
        line += f"{values['ece']:>7.3f}"
        base = values["baseline"]
        line += f"{base['perplexity']:>21.2f}{base['accuracy']:>10.1%}" if base else f"{'–':>21}{'–':>10}"
        line += "".join(
            f"{values[key]:>{len(title) + 3}.5g}" if key in values else f"{'–':>{len(title) + 3}}"
            for key, title in extra.items()
        )
        lines.append(line)
    if not several:
        mean = ", running mean of the weights" if reports[0]["weights"] == "ema" else ""
        lines = [f"{reports[0]['checkpoint']}, step {reports[0]['step']}{mean}", "", *lines]
    return "\n".join(lines)


def details(reports: Sequence[Report]) -> str:
    """By length, by confidence and by token, for each checkpoint and split."""
    return "\n\n".join(
        "\n".join(
            [
                f"{_model(report)}, {name}",
                *_by_length(values),
                "",
                *_by_members(values),
                *_reliability(values),
                "",
                *_by_token(values),
            ]
        )
        for report in reports
        for name, values in report["splits"].items()
    )


def _model(report: Report) -> str:
    return f"{report['name']} step {report['step']}" + (" ema" if report["weights"] == "ema" else "")


def _by_length(values: Report) -> list[str]:
    lines = [f"{'tokens':>13}{'sequences':>11}{'targets':>12}{'loss':>9}{'perplexity':>12}{'accuracy':>10}"]
    for row in values["by_length"]:
        span = f"{row['from']:,}–{row['to']:,}"
        lines.append(
            f"{span:>13}{row['sequences']:>11,}{row['targets']:>12,}{row['loss']:>9.4f}{row['perplexity']:>12.2f}"
            f"{row['accuracy']:>10.1%}"
        )
    return lines


def _by_members(values: Report) -> list[str]:
    if "by_members_before" not in values:
        return []
    lines = [f"{'before':>13}{'targets':>12}{'loss':>9}"]
    for row in values["by_members_before"]:
        span = f"{row['from']:,} or more" if row["to"] is None else f"{row['from']:,}–{row['to']:,}"
        lines.append(f"{span if row['to'] != row['from'] else row['to']:>13}{row['targets']:>12,}{row['loss']:>9.4f}")
    return [*lines, ""]


def _reliability(values: Report) -> list[str]:
    lines = [f"{'confidence':>13}{'targets':>12}{'mean':>8}{'accuracy':>10}"]
    for row in values["reliability"]:
        span = f"{row['from']:.2f}–{row['to']:.2f}"
        lines.append(f"{span:>13}{row['targets']:>12,}{row['confidence']:>8.1%}{row['accuracy']:>10.1%}")
    return [*lines, f"expected calibration error {values['ece']:.4f}"]


def _by_token(values: Report) -> list[str]:
    lines = [f"{'token':>13}{'targets':>12}{'predicted':>12}{'recall':>9}{'precision':>11}"]
    rows = sorted(values["by_token"].items(), key=lambda item: -item[1]["targets"])
    for token, row in rows[:_TOKENS]:
        shares = "".join(
            f"{'–' if row[key] is None else format(row[key], '.1%'):>{width}}"
            for key, width in (("recall", 9), ("precision", 11))
        )
        lines.append(f"{token[:12]:>13}{row['targets']:>12,}{row['predicted']:>12,}{shares}")
    return lines
