"""What the benchmarks have in common: their models. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from longseq.errors import LongseqError
from longseq.trained_model import Source, find


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
    """What a model is called next to the others: its name, with the step where two share that, or else its folder."""
    names = (source.name, f"{source.name} step {source.step}", str(source.folder))
    others = [other for other in sources if other is not source]
    taken = [{other.name, f"{other.name} step {other.step}"} for other in others]
    return next((name for name in names if not any(name in each for each in taken)), names[-1])
