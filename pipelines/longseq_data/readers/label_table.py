"""Tables of labelled sequences: CSV and TSV, plain or compressed. Rows are counted from 1, below the header."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longseq_data.errors import DataError, one_line
from longseq_data.numbers import number_in
from longseq_data.splits import SplitRule
from longseq_data.tokenization import ids_of
from longseq_data.vocabulary import ALPHABETS, BUILT_IN, IGNORE

from .quotation import all_closed, may_swallow, swallows
from .sources import URL, open_binary, reading_error

Task = Literal["classification", "regression", "residue-classes", "residue-numbers"]
TASKS: tuple[Task, ...] = ("classification", "regression", "residue-classes", "residue-numbers")
PER_RESIDUE = ("residue-classes", "residue-numbers")
OF_CLASSES = ("classification", "residue-classes")

# What columns are usually called, in lower case.
_SEQUENCES = ("sequence", "mutated_sequence", "seq", "protein_sequence", "primary")
_LABELS = ("label", "labels", "target", "dms_score", "score", "fitness", "y")
_IDENTIFIERS = ("id", "identifier", "name", "accession")
_MISSING = ("", "nan", "na", "n/a", "null")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("valid", "val", "validation", "dev"), "valid"
)
_TABLE = re.compile(r"\.(csv|tsv|tab)(\.(gz|zst|xz|bz2))?$", re.IGNORECASE)
_TEXT = re.compile(r"\.txt(\.(gz|zst|xz|bz2))?$", re.IGNORECASE)
_LIST = re.compile(r"[\s,;]+")


def is_table(source: str, column: str | None = None) -> bool:
    """Whether a name is that of a CSV or TSV file; or, of a .txt, its first line a header that has the column.

    Raises:
        DataError: for a .txt that cannot be read.
    """
    if not column or not _TEXT.search(source):
        return bool(_TABLE.search(source))
    with open_binary(source, "text") as file:
        head = _first_line(file.peek(1 << 16))
    return column in [name.strip().strip('"') for name in head.split(_delimiter(source, head))]


@dataclass(frozen=True, eq=False)
class Table:
    """A table's cells as text."""

    source: str
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def place(self, row: int) -> str:
        return f"{self.source}, row {row + 1}"

    def cells(self, column: str, what: str, *, blanks: bool = False) -> list[str]:
        """A column, without white space around its cells, unless ``blanks`` count: to DSSP one is a residue's state.

        Raises:
            DataError: where there is none of this name.
        """
        if column not in self.columns:
            raise DataError(
                f"{self.source}: has no column {column!r} for {what}; its columns are {', '.join(self.columns)}."
            )
        return self.columns[column] if blanks else [cell.strip() for cell in self.columns[column]]

    def sequence_column(self, given: str | None) -> str:
        """The column of sequences: the one that is given, or by its name.

        Raises:
            DataError: where there is none, or more than one might be meant.
        """
        return given or self._named(_SEQUENCES, "sequences", "--sequence", "sequence")

    def label_column(self, given: str | None, others: Sequence[str | None]) -> str:
        """The column of labels: the one that is given, or by its name, or the only one beside ``others``."""
        if given:
            return given
        left = [name for name in self.columns if name not in others and name.lower() not in ("", *_IDENTIFIERS)]
        return left[0] if len(left) == 1 else self._named(_LABELS, "labels", "--label", "label")

    def identifiers(self, given: str | None) -> list[str]:
        """The rows' names: of the column that is given, or is called id; else their numbers from 1."""
        column = given or next((name for name in self.columns if name.lower() in _IDENTIFIERS), None)
        return self.cells(column, "the ids") if column else [str(row + 1) for row in range(len(self))]

    def _named(self, usual: Sequence[str], what: str, option: str, key: str) -> str:
        found = [name for name in self.columns if name.lower() in usual]
        if len(found) == 1:
            return found[0]
        which = f"several may hold the {what} ({', '.join(found)})" if found else f"none is known to hold the {what}"
        raise DataError(
            f"{self.source}: of its columns ({', '.join(self.columns)}) {which}; name the one with {option} "
            f"({key}= in Python)."
        )


def read_table(source: str) -> Table:
    """Read a CSV or TSV file, or a URL, whole. Fields are separated as the header is: by tabs, commas or semicolons.

    Raises:
        DataError: for a file that cannot be read, has no rows, or lines with another number of fields.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow

    with open_binary(source, "text") as file:
        head = _first_line(file.peek(1 << 16))
        parse = arrow.ParseOptions(delimiter=_delimiter(source, head), newlines_in_values=True)
        try:
            # The header as a row: so the types of columns whose names repeat are text, too.
            read = arrow.ReadOptions(autogenerate_column_names=True, block_size=1 << 24)
            width = arrow.read_csv(pa.BufferReader(f"{head}\n".encode()), read, parse).num_columns
            kinds = {f"f{number}": pa.string() for number in range(width)}
            table = arrow.read_csv(
                file, read, parse, arrow.ConvertOptions(column_types=kinds, strings_can_be_null=False)
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{source}: no table with a header and equally long rows ({one_line(error)}).") from None
        except Exception as error:  # of the filesystem, or of the file's compression
            raise reading_error(source, None, error) from error
    columns = [column.to_pylist() for column in table.columns]
    names = [str(column[0]).strip().removeprefix("\ufeff") for column in columns]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise DataError(f"{source}: {twice[0]!r} is the name of several columns; rename them.")
    if len(columns[0]) < 2:
        raise DataError(f"{source}: a table without rows; it needs a header, and a row for each sequence.")
    for place, (name, column) in enumerate(zip(names, columns, strict=True)):
        suspects = [row for row, cell in enumerate(column) if may_swallow(cell, parse.delimiter, len(names))]
        sure = (row for row in suspects if swallows(column[row], parse.delimiter, len(names), place))
        row = next(sure, None)
        if row is None and suspects and not all_closed(source, parse.delimiter):
            row = suspects[0]
        if row is not None:
            raise DataError(
                f"{source}, row {row}: {name or 'a cell'} holds the lines that follow, as a quotation mark is not "
                "closed; remove it, or write the cell in quotation marks with two of them inside."
            )
    return Table(source, {name: column[1:] for name, column in zip(names, columns, strict=True)})


def _first_line(begin: bytes) -> str:
    return begin.split(b"\n", 1)[0].decode("utf-8-sig", "replace").strip("\r")


def _delimiter(source: str, head: str) -> str:
    if re.search(r"\.(tsv|tab)\b", source, re.IGNORECASE) or ("\t" in head and "," not in head):
        return "\t"
    return ";" if ";" in head and "," not in head else ","


@dataclass(frozen=True)
class LabelSpec:
    """What is read of a table, and how.

    Attributes:
        tokens: what the sequences are read as: protein, dna, bytes or a tokenizer's file.
        split: column that says train, valid or test; rows where it is empty are left out. None: a hash decides.
        cluster: column whose value is hashed, so that a cluster stays together; None: the sequence.
        classes: labels by their ids; (): those of the table.
    """

    source: str
    tokens: str
    sequence: str
    label: str
    task: Task
    split: str | None = None
    cluster: str | None = None
    valid_fraction: float = 0.0
    test_fraction: float = 0.0
    classes: tuple[str, ...] = ()

    def read(self) -> Labelled:
        """The rows; read once, as long as the file stays the same."""
        local = not URL.match(self.source) and Path(self.source).exists()
        return _read(self, Path(self.source).stat().st_mtime_ns if local else 0)


@dataclass(frozen=True, eq=False)
class Labelled:
    """The labelled rows of a table, in its order.

    Attributes:
        sequences: ids of each, without marks at the ends.
        labels: of each row (1,), or per residue (n,): ids of classes (int64, IGNORE: no label) or numbers (float64,
            NaN: no label).
        splits: train, valid or test, of each.
        rows: their numbers in the table, from 0.
        left_out: rows without a label, and rows without a split.
    """

    table: Table
    classes: tuple[str, ...]
    sequences: list[npt.NDArray[np.unsignedinteger]]
    labels: list[npt.NDArray[Any]]
    splits: list[str]
    rows: list[int]
    left_out: tuple[int, int]

    def of(self, split: str | None) -> list[int]:
        """Numbers of the rows of a split, among those that are here; None: all."""
        return [number for number, each in enumerate(self.splits) if split in (None, each)]

    @cached_property
    def longest(self) -> int:
        return max(map(len, self.sequences))


@lru_cache(maxsize=4)
def _read(spec: LabelSpec, stamp: int) -> Labelled:
    table = read_table(spec.source)
    sequences = table.cells(spec.sequence, "the sequences")
    cells = table.cells(spec.label, "the labels", blanks=True)
    splits = [_SPLITS.get(cell.lower(), cell) for cell in table.cells(spec.split, "the splits")] if spec.split else []
    clusters = table.cells(spec.cluster, "the clusters") if spec.cluster else []
    parse = _PARSERS[spec.task]
    ids, texts, kept = [], [], []
    unlabelled = unsplit = 0
    for row, (sequence, cell) in enumerate(zip(sequences, cells, strict=True)):
        place = table.place(row)
        if splits and not splits[row]:
            unsplit += 1
            continue
        if splits and splits[row] not in ("train", "valid", "test"):
            raise DataError(f"{place}: {spec.split} is {splits[row]!r}; write train, valid or test, or leave it empty.")
        if spec.task != "residue-classes" or len(cell) != len(sequence):
            cell = cell.strip()
        if cell.strip().lower() in _MISSING:
            unlabelled += 1
            continue
        found = tokens_of(sequence, spec.tokens, f"{place}, {spec.sequence}")
        label = parse(cell, place, spec.label)
        if spec.task in PER_RESIDUE and len(label) != len(found):
            unit = ALPHABETS[spec.tokens].unit if spec.tokens in ALPHABETS else "tokens"
            raise DataError(
                f"{place}: {spec.label} has {len(label):,} labels, but {spec.sequence} {len(found):,} {unit}; give one "
                "label for each."
            )
        ids.append(found)
        texts.append(label)
        kept.append(row)
    if not kept:
        raise DataError(f"{spec.source}: no row has a label in {spec.label}; name the column of labels (--label).")
    classes = spec.classes or _classes(spec, texts)

    def drawn(test: float) -> list[str]:
        rule = SplitRule(spec.valid_fraction, test, by="id" if clusters else "sequence")
        if clusters:
            return [rule.split(clusters[row]) for row in kept]
        return [rule.split("", sequence.tobytes()) for sequence in ids]

    given = [splits[row] for row in kept] if splits else drawn(spec.test_fraction)
    if splits and "valid" not in given:  # a share of what is trained on
        given = [new if old == "train" else old for old, new in zip(given, drawn(0.0), strict=True)]
    labels = [
        _encoded(label, classes, spec, table.place(row)) if spec.task in OF_CLASSES else np.array(label, np.float64)
        for row, label in zip(kept, texts, strict=True)
    ]
    return Labelled(table, classes, ids, labels, given, kept, (unlabelled, unsplit))


def tokens_of(sequence: str, tokens: str, what: str) -> npt.NDArray[np.unsignedinteger]:
    """A sequence as ids.

    Raises:
        DataError: for an empty one, and a letter that the model does not know; ``what`` says whose.
    """
    if not sequence:
        raise DataError(f"{what}: is empty; give a sequence, or leave the row out.")
    found = ids_of(sequence, tokens, what)
    return np.array(found, dtype=np.uint8 if tokens in BUILT_IN and max(found) < 256 else np.uint32)


def task_of(table: Table, sequence: str, label: str) -> Task:
    """What the labels are, by themselves.

    Raises:
        DataError: where they may be classes or numbers.
    """
    pairs = zip(table.cells(sequence, "the sequences"), table.cells(label, "the labels", blanks=True), strict=True)
    labelled = [(letters, cell) for letters, cell in pairs if cell.strip().lower() not in _MISSING]
    cells = [cell.strip() for _, cell in labelled]
    if not cells:
        raise DataError(f"{table.source}: no row has a label in {label}; name the column of labels (--label).")
    if all(map(_is_number, cells)):
        if not all(re.fullmatch(r"[+-]?\d+", cell) for cell in cells):
            return "regression"
        if len(set(cells)) <= 2:
            return "classification"
        raise DataError(
            f"{table.source}: {label} holds whole numbers, {len(set(cells))} different ones, which may be classes or "
            "amounts; say which with --task classification or --task regression (task= in Python)."
        )
    if all(cell.startswith("[") or (len(parts := _LIST.split(cell)) > 1 and _all_numbers(parts)) for cell in cells):
        return "residue-classes" if any('"' in cell for cell in cells) else "residue-numbers"
    if all(len(letters) in (len(cell), len(cell.strip())) for letters, cell in labelled) and max(map(len, cells)) > 1:
        return "residue-classes"
    if any(map(_is_number, cells)):
        text = next(cell for cell in cells if not _is_number(cell))
        raise DataError(
            f"{table.source}: {label} holds numbers and also {text[:40]!r}; correct that, leave it empty, or, if these "
            "are classes, say so with --task classification (task= in Python)."
        )
    return "classification"


def _is_number(text: str) -> bool:
    return text.lower() in _MISSING or not math.isnan(number_in(text))


def _all_numbers(parts: Sequence[str]) -> bool:
    return all(_is_number(part) for part in parts if part)


def _residue_classes(cell: str, place: str, column: str) -> list[str | None]:
    if not cell.startswith("["):
        return list(cell)
    found = _json(cell, place, column)
    return [None if label is None or str(label).lower() in _MISSING else str(label) for label in found]


def _residue_numbers(cell: str, place: str, column: str) -> list[float]:
    if cell.startswith("["):
        return [_number(str(value).replace("None", ""), place, column) for value in _json(cell, place, column)]
    return [_number(part, place, column) for part in _LIST.split(cell) if part]


_PARSERS: dict[str, Callable[[str, str, str], list[Any]]] = {
    "classification": lambda cell, place, column: [cell],
    "regression": lambda cell, place, column: [_number(cell, place, column)],
    "residue-classes": _residue_classes,
    "residue-numbers": _residue_numbers,
}


def _json(cell: str, place: str, column: str) -> list[object]:
    try:
        found = json.loads(cell)
        if isinstance(found, list):
            return found
    except ValueError:
        pass
    raise DataError(f"{place}: {column} begins with [ and is no list, as [0.5, null, 1]; correct it.")


def _number(text: str, place: str, column: str) -> float:
    """NaN where a residue has no label."""
    if text.lower() in _MISSING:
        return math.nan
    value = number_in(text)
    if not math.isfinite(value):
        raise DataError(
            f"{place}: {column} is {text[:40]!r}, which is no number; correct it, or leave it empty, which leaves the "
            "row out."
        )
    return value


def _classes(spec: LabelSpec, texts: Sequence[Sequence[str | None]]) -> tuple[str, ...]:
    """The labels that occur, sorted; numbers by their size."""
    if spec.task not in OF_CLASSES:
        return ()
    found = {label for labels in texts for label in labels if label is not None}
    numbers = all(map(_is_number, found))
    return tuple(sorted(found, key=(lambda label: (float(label), label)) if numbers else None))


def _encoded(
    labels: Sequence[str | None], classes: tuple[str, ...], spec: LabelSpec, place: str
) -> npt.NDArray[np.int64]:
    numbers = {label: number for number, label in enumerate(classes)} | {None: IGNORE}
    unknown = next((label for label in labels if label not in numbers), None)
    if unknown is not None:
        shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        raise DataError(
            f"{place}: {spec.label} is {unknown!r}, a class that the model has not learned; it knows {shown}."
        )
    return np.array([numbers[label] for label in labels], dtype=np.int64)
