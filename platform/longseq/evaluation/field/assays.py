"""Deep mutational scans in ProteinGym's format: a reference file, and a CSV for each assay. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longseq.errors import LongseqError
from longseq.evaluation.field.averages import Assay
from longseq.evaluation.field.measures import Floats, Labels
from longseq.evaluation.field.tables import columns, number, rows
from longseq.evaluation.records import Record, record_of
from longseq.evaluation.variants import Variant, parse
from longseq.trained_model import Source

SUBSTITUTIONS, INDELS = "substitutions", "indels"
KINDS = (SUBSTITUTIONS, INDELS)

_CLINICAL = "clinical_"  # how the names of their reference files begin
# In the names of ProteinGym's other downloads, whose files are called as the assays are.
_NO_ASSAYS = ("cv_folds", "raw_dms", "scores", "clinical")
_NEEDED = {"DMS_id", "DMS_filename", "target_seq"}
_CHANGES = re.compile(r"[A-Za-z]\d+[A-Za-z](:[A-Za-z]\d+[A-Za-z])*")


@dataclass(frozen=True)
class Entry:
    """A line of a reference file whose assay is here."""

    assay: Assay
    file: Path
    target: str  # the wild type's residues
    cutoff: float  # DMS_binarization_cutoff; NaN: not given


@dataclass(frozen=True)
class Scan:
    """The mutants of an assay.

    Attributes:
        kind: substitutions, if mutants are written as changes of the target (A24G:C30D); else indels.
        mutants: the changes; of indels, whole sequences.
        places: ``FILE, line N`` of each.
        measured: (n,) DMS_score.
        fit: (n,) DMS_score_bin, or DMS_score at or above the reference's cutoff; None: neither is given.
    """

    kind: str
    mutants: list[str]
    places: list[str]
    measured: Floats
    fit: Labels | None

    def variants(self, wild: Record) -> list[Variant]:
        """Substitutions, held against the target. Raises LongseqError naming file and line of one that does not fit."""
        return [parse(text, wild, place) for text, place in zip(self.mutants, self.places, strict=True)]

    def sequences(self, source: Source) -> list[Record]:
        """Indels, as a model reads them. Raises LongseqError naming file and line of one that it cannot read."""
        both = zip(self.mutants, self.places, strict=True)
        return [record_of(source, place, text.upper(), place) for text, place in both]


@dataclass(frozen=True)
class Collection:
    """What there is of reference files in a folder."""

    entries: list[Entry]
    absent: list[str] = field(default_factory=list)  # assays that a reference names and that are not here
    passed_over: list[Path] = field(default_factory=list)  # reference files of labels from the clinic


def is_scan(path: Path) -> bool:
    """Whether a file is one assay's CSV, by its header."""
    if path.suffix.lower() != ".csv":
        return False
    names = columns(path)
    return "DMS_score" in names and ("mutant" in names or "mutated_sequence" in names)


def collection(folder: Path, reference: Path | None = None, chosen: Iterable[str] = ()) -> Collection:
    """The assays of a folder: those that its reference files name.

    Reference files are the CSVs with the columns DMS_id, DMS_filename and target_seq, in the folder itself and in
    reference_files/, but for those of labels from the clinic (clinical_*.csv), which are no measurements. Assays lie in
    the folder or one below. Where assays of substitutions and of indels have the same name, the one is taken whose
    folder is called as the reference file is (indels or substitutions).

    Args:
        reference: the reference file, if it lies elsewhere.
        chosen: DMS_id of the assays that are wanted; none: all.

    Raises:
        LongseqError: where there is no reference file, no assay, or not one of those wanted.
    """
    if not folder.is_dir():
        raise LongseqError(f"{folder}: no folder; give the one with ProteinGym's reference file and assays.")
    found = [reference] if reference else _references(folder)
    clinical = [path for path in found if path.name.lower().startswith(_CLINICAL)]
    found = [path for path in found if path not in clinical]
    if clinical and not found:
        raise LongseqError(
            f"{clinical[0]}: lists labels from the clinic, which are no measurements; give ProteinGym's "
            "DMS_substitutions.csv or DMS_indels.csv with their assays."
        )
    if not found:
        raise LongseqError(
            f"{folder}: no reference file, which is a CSV with the columns {', '.join(sorted(_NEEDED))}; put "
            "ProteinGym's DMS_substitutions.csv there, or name it (--reference)."
        )
    wanted = list(chosen)
    entries: list[Entry] = []
    absent: list[str] = []
    known: set[str] = set()
    for path in found:
        missing = _NEEDED - set(columns(path))
        if missing:
            raise LongseqError(
                f"{path}: no reference file of ProteinGym: it has no column {', '.join(sorted(missing))}."
            )
        named: set[str] = set()
        for place, row in rows(path):
            known.add(row["DMS_id"])
            if row["DMS_id"] in named:
                raise LongseqError(f"{place}: a second assay is called {row['DMS_id']}; give each a DMS_id of its own.")
            named.add(row["DMS_id"])
            if wanted and row["DMS_id"] not in wanted:
                continue
            file = _file(folder, row["DMS_filename"], path.name)
            if file is None:
                absent.append(row["DMS_id"])
            elif file not in [entry.file for entry in entries]:  # the same reference may lie in both places
                entries.append(_entry(row, place, file))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise LongseqError(f"{found[0]}: has no assay {unknown[0]!r}; the column DMS_id names them.")
    if not entries:
        raise LongseqError(f"{folder}: none of the {len(absent)} assays of {found[0].name} is here; unpack them there.")
    return Collection(entries, absent, clinical)


def scan(path: Path, cutoff: float = math.nan) -> Scan:
    """Read an assay.

    Raises:
        LongseqError: for columns that are missing, and a measurement that is no number; naming the line.
    """
    names = columns(path)
    if "DMS_score" not in names or not {"mutant", "mutated_sequence"} & set(names):
        raise LongseqError(
            f"{path}: no assay of ProteinGym: it needs the columns DMS_score, and mutant or mutated_sequence."
        )
    lines = list(rows(path))
    if not lines:
        raise LongseqError(f"{path}: an assay without any mutant.")
    measured = np.array([number(row, "DMS_score", place) for place, row in lines])
    # One that is none among them, a wild type's "WT" say, is refused by its line: its score would not be comparable.
    looks = _CHANGES.fullmatch if "mutated_sequence" in names else re.compile(r".*\d.*").fullmatch
    changes = "mutant" in names and any(looks(row["mutant"].strip()) for _, row in lines)
    column = "mutant" if changes or "mutated_sequence" not in names else "mutated_sequence"
    for place, row in lines:
        if not row[column].strip():
            raise LongseqError(f"{place}: {column} is empty; give the mutant, or leave the line out.")
    fit = None
    if "DMS_score_bin" in names:
        fit = np.array([number(row, "DMS_score_bin", place) for place, row in lines]) > 0.5
    elif not math.isnan(cutoff):
        fit = measured >= cutoff
    mutants = [row[column].strip() for _, row in lines]
    return Scan(SUBSTITUTIONS if changes else INDELS, mutants, [place for place, _ in lines], measured, fit)


def _references(folder: Path) -> list[Path]:
    found, unreadable = [], None
    for path in sorted([*folder.glob("*.csv"), *folder.glob("reference_files/*.csv")]):
        try:
            if set(columns(path)) >= _NEEDED:
                found.append(path)
        except LongseqError as error:  # any table may lie there
            unreadable = unreadable or error
    if unreadable and not found:
        raise unreadable
    return found


def _file(folder: Path, name: str, reference: str) -> Path | None:
    if (folder / name).is_file():
        return folder / name
    own = [kind for kind in KINDS if kind in reference.lower()]
    others = [kind for kind in KINDS if own and kind not in own]
    found = [path / name for path in sorted(folder.iterdir()) if path.is_dir() and (path / name).is_file()]
    other = (*others, *_NO_ASSAYS)
    return next((path for path in found if not any(word in path.parent.name.lower() for word in other)), None)


def _entry(row: dict[str, str], place: str, file: Path) -> Entry:
    target = row["target_seq"].strip().upper()
    if not target:
        raise LongseqError(f"{place}: target_seq is empty; it must be the wild type's sequence.")
    if Path(row["DMS_id"]).name != row["DMS_id"]:  # its results are kept in a file of that name
        raise LongseqError(
            f"{place}: DMS_id {row['DMS_id']!r} can be no file's name; leave out '/', or name the assay."
        )
    depth = row.get("MSA_Neff_L_category", "")
    assay = Assay(
        id=row["DMS_id"],
        protein=row.get("UniProt_ID") or row["DMS_id"],
        selection=row.get("coarse_selection_type") or row.get("selection_type", ""),
        taxon=row.get("taxon", ""),
        msa_depth=depth[:1].upper() + depth[1:],
        length=len(target),
    )
    given = row.get("DMS_binarization_cutoff", "")
    return Entry(assay, file, target, number(row, "DMS_binarization_cutoff", place) if given else math.nan)
