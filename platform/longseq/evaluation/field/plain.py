"""What the benchmarks have in common: their models, and their reports as JSON. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longseq.errors import LongseqError
from longseq.opening import Source, find


def proteins(
    targets: str | Path | Source | Iterable[str | Path | Source], overrides: Sequence[str], ema: bool
) -> list[Source]:
    """One or several models of proteins.

    Raises:
        LongseqError: for none, for what is no model, and for a model of something else.
    """
    several = [targets] if isinstance(targets, str | Path | Source) else list(targets)
    sources = [find(target, overrides, ema=ema) for target in several]
    if not sources:
        raise LongseqError("targets: no model; give at least one.")
    for source in sources:
        if source.vocabulary.name != "protein":
            raise LongseqError(f"{source.folder}: a model of {source.vocabulary.name}; this is about proteins.")
    return sources


def label(source: Source, sources: Sequence[Source]) -> str:
    """What a model is called next to the others: its name, and the step where two have the same."""
    alike = [other for other in sources if other.name == source.name]
    return source.name if len(alike) == 1 else f"{source.name} step {source.step}"


def plain(value: Any) -> Any:
    """With None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
