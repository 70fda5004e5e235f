"""Which variants of which wild type are to be scored: single ones, a list, or a deep mutational scan. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from longseq.errors import LongseqError
from longseq.evaluation.field.assays import SUBSTITUTIONS, is_scan, scan
from longseq.evaluation.records import Record, records
from longseq.evaluation.variants import Variant, read_variants
from longseq.trained_model import Source


class Variants(NamedTuple):
    """Variants of a wild type, each with its DMS_score if it came with one."""

    wild: Record
    variants: list[Variant]
    measured: list[float | None]


def asked_for(source: Source, file: str, variants: Sequence[str], table: str | Path | None) -> Variants:
    """What :func:`longseq.variant_effects` was asked for. Raises LongseqError for what does not fit together."""
    if source.vocabulary.name != "protein":
        raise LongseqError(f"{source.folder}: a model of text; variants are those of proteins.")
    found = list(islice(records(source, file), 2))
    if len(found) != 1:
        raise LongseqError(
            f"{file}: more than one record, and variants are held against one wild type: give a FASTA of it alone."
        )
    (wild,) = found
    if table is None or not is_scan(Path(table)):
        given = read_variants(variants, Path(table) if table else None, wild)
        return Variants(wild, given, [None] * len(given))
    assay = scan(Path(table))
    if assay.kind != SUBSTITUTIONS:
        raise LongseqError(
            f"{table}: its mutants are whole sequences, and variants are changes, as A24G; `longseq benchmark "
            "proteingym` takes such a file."
        )
    given = read_variants(variants, None, wild)
    return Variants(wild, [*given, *assay.variants(wild)], [*[None] * len(given), *assay.measured.tolist()])
