"""Runs next to each other: what differs in their settings, how far they learned, what they score. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from longseq.errors import LongseqError
from longseq.evaluation.label_measures import MEASURES
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq_data.errors import DataError

_ALWAYS_DIFFERENT = ("run.name", "run.dir")
_CURVES = ("train/loss", "valid/loss")
_SPEED = "train/tokens_per_second"
_SCORES = ("loss", "perplexity", "accuracy")


@dataclass(frozen=True)
class Compared:
    """What :func:`compare` found of one run.

    settings: its values of the keys in which the runs differ. curves: of the training and validation loss, what was
    last and what was lowest, with their steps: ``{"valid/loss": {"last": (step, nats), "lowest": (step, nats)}}``.
    tokens_per_second: the median over the run. scores: of its newest step that was evaluated with the run's own
    settings, by split: loss (nats per target), perplexity, accuracy.
    """

    run: str
    step: int | None
    settings: dict[str, Any]
    curves: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    tokens_per_second: float | None = None
    scores_step: int | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def compare(runs: Iterable[str | Path]) -> list[Compared]:
    """What differs between runs, in the order in which they are given.

    Raises:
        LongseqError: for fewer than two, or for a folder that holds no run.
    """
    opened = [Run.open(run) for run in runs]
    if len(opened) < 2:
        raise LongseqError("compare needs two runs or more.")
    settings = [_settings(run) for run in opened]
    keys = [
        key
        for key in dict.fromkeys(key for values in settings for key in values)
        if key not in _ALWAYS_DIFFERENT and any(values.get(key) != settings[0].get(key) for values in settings)
    ]
    return [
        _compared(run, {key: values.get(key) for key in keys}) for run, values in zip(opened, settings, strict=True)
    ]


def _settings(run: Run) -> dict[str, Any]:
    return dict(_flat("", OmegaConf.to_container(OmegaConf.structured(run.config()))))


def _flat(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        yield prefix, values


def _compared(run: Run, settings: dict[str, Any]) -> Compared:
    curves = read_curves(run.tensorboard_dir) if run.tensorboard_dir.is_dir() else {}
    lowest = {}
    for tag in _CURVES:
        if points := [(step, value) for step, value in curves.get(tag, {}).items() if value == value]:
            lowest[tag] = {"last": max(points), "lowest": min(points, key=lambda point: point[1])}
    speed = curves.get(_SPEED, {})
    scored, scores = _scores(run)
    return Compared(
        run=run.path.name,
        step=max((step for curve in curves.values() for step in curve), default=None),
        settings=settings,
        curves=lowest,
        tokens_per_second=median(speed.values()) if speed else None,
        scores_step=scored,
        scores=scores,
    )


def _scores(run: Run) -> tuple[int | None, dict[str, dict[str, float]]]:
    """The newest step's, of the last weights; a damaged file is an error, as a missing score would go unnoticed."""
    newest: int | None = None
    scores: dict[str, dict[str, float]] = {}
    for path in sorted(run.evaluations_dir.glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if report["overrides"] or report["sequences_limit"] is not None or report["weights"] != "last":
                continue
            step, splits = report["step"], report["splits"]
            found = {
                name: {key: float(values[key]) for key in (_measured(values) if "labels" in values else _SCORES)}
                for name, values in splits.items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a report of `longseq evaluate` ({error!r}); remove it.") from None
        if newest is None or step > newest:
            newest, scores = step, {}
        if step == newest:
            scores |= found
    return newest, scores


def _measured(values: dict[str, Any]) -> list[str]:
    """The measures of labels that a report has a value of."""
    return [key for key in MEASURES if values.get(key) is not None]


def rows(found: Sequence[Compared]) -> Iterator[tuple[str, list[str]]]:
    """(what, a cell per run), as ``longseq compare`` prints them; an empty name begins another part."""
    yield "run", [one.run for one in found]
    yield "step", [_number(one.step) for one in found]
    yield "", []
    for key in found[0].settings:
        yield key, [_shown(one.settings[key]) for one in found]
    if not found[0].settings:
        yield "settings", ["the same"] * len(found)
    yield "", []
    for tag in _CURVES:
        for which in ("last", "lowest"):
            if any(tag in one.curves for one in found):
                yield f"{tag}, {which}", [_point(one.curves.get(tag, {}).get(which)) for one in found]
    yield "tokens/s, median", [_number(one.tokens_per_second) for one in found]
    splits = dict.fromkeys(name for one in found for name in one.scores)
    if splits:
        yield "", []
        yield "evaluated at step", [_number(one.scores_step) for one in found]
    for name in splits:
        for key in dict.fromkeys(key for one in found for key in one.scores.get(name, {})):
            values = [one.scores.get(name, {}).get(key) for one in found]
            yield f"{name}, {key}", ["–" if value is None else f"{value:.4f}" for value in values]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _point(point: tuple[int, float] | None) -> str:
    return "–" if point is None else f"{point[1]:.4f} at {point[0]:,}"


def _shown(value: Any) -> str:
    if isinstance(value, list):  # sources have names
        return ", ".join(
            f"{each['name']} × {each['weight']:g}" if isinstance(each, dict) else str(each) for each in value
        )
    return "–" if value is None else str(value)
