"""Vectors of sequences: what ``longseq embed`` does, as a function that returns data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.errors import LongseqError
from longseq.evaluation.records import look, records
from longseq.opening import Source, find

if TYPE_CHECKING:
    from longseq.evaluation.embedding import Embedded


def embed(
    target: str | Path | Source,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    layer: int | None = None,
) -> Iterator[Embedded]:
    """A vector of size E for each residue of each record, and their mean, in the file's order.

    Args:
        target: a run folder, a checkpoint, an exported folder, or what ``longseq.find`` returned for one of these.
        file: FASTA or text, as the model was trained on.
        overrides: ``section.key=value`` on top of the run's configuration.
        ema: with the running mean of the weights.
        layer: 0: the embedding, k: after block k; None: after the final norm, which is what the head reads.

    Returns:
        records with ``identifier``, ``residues`` (length, E) and ``mean`` (E,), float32; memory holds one batch.

    Raises:
        LongseqError, DataError: at once, for a model or file that cannot be used; while it is read, for a bad record.
    """
    source = find(target, overrides, ema=ema)
    if layer is not None and not 0 <= layer <= source.spec.depth:
        raise LongseqError(
            f"layer={layer}: {source.name} has {source.spec.depth} blocks; take 0 to {source.spec.depth}."
        )
    look(source, str(file))
    return _vectors(source, str(file), layer)


def _vectors(source: Source, file: str, layer: int | None) -> Iterator[Embedded]:
    from longseq.evaluation.embedding import vectors

    yield from vectors(source.load(tuned=True), source.vocabulary, records(source, file), layer)
