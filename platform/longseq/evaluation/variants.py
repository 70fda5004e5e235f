"""Variants of a protein as people write them: A24G, or several changes at once, A24G:C30D. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longseq.errors import LongseqError
from longseq.evaluation.records import Record
from longseq_data.os_errors import explained
from longseq_data.vocabulary import LETTERS, Tokens

_CHANGE = re.compile(rf"([{LETTERS}])([1-9]\d*)([{LETTERS}])")

_HEADERS = ("mutant", "mutants", "mutated_sequence", "mutation", "variant", "variants")


@dataclass(frozen=True)
class Variant:
    """``changes``: place in the wild type's row (1 is the first residue), its residue's id, the new one's."""

    name: str
    changes: tuple[tuple[int, int, int], ...]

    def applied(self, row: Tokens) -> Tokens:
        """The row with the changes made."""
        mutant = row.copy()
        for position, _, new in self.changes:
            mutant[position] = new
        return mutant


def read_variants(words: Iterable[str], file: Path | None, wild: Record) -> list[Variant]:
    """Variants given one by one, then those of a file: one per line, its first word; blank lines and # are skipped.

    Raises:
        LongseqError: for a file that cannot be read or names no variant, and a variant that does not fit the wild
            type; naming the line, the position and the residue.
    """
    listed = list(_lines(file))
    if file is not None and not listed:
        raise LongseqError(f"{file}: names no variant; write one per line, as A24G.")
    if listed and listed[0][0].lower() in _HEADERS:
        raise LongseqError(
            f"{listed[0][1]}: {listed[0][0]!r} is a table's header: a deep mutational scan is a .csv with the columns "
            "mutant and DMS_score, and a list has a variant per line and no header."
        )
    return [parse(word, wild, place) for word, place in (*((word, "variant") for word in words), *listed)]


def parse(text: str, wild: Record, place: str) -> Variant:
    """One variant, held against the wild type."""
    changes: list[tuple[int, int, int]] = []
    for word in text.split(":"):
        match = _CHANGE.fullmatch(word.upper())
        if not match:
            raise LongseqError(
                f"{place}: {word!r} is no change of a residue; write residue, position and new residue, as in A24G, "
                "and several joined by ':'."
            )
        old, position, new = LETTERS.index(match[1]), int(match[2]), LETTERS.index(match[3])
        if position > wild.length:
            raise LongseqError(
                f"{place}: {word} does not fit: {wild.identifier} has {wild.length} residues, and no position "
                f"{position}; positions count from 1."
            )
        there = int(wild.row[position])
        if there != old:
            raise LongseqError(
                f"{place}: {word} does not fit: position {position} of {wild.identifier} is {LETTERS[there]}, not "
                f"{match[1]}; positions count from 1."
            )
        if position in [at for at, _, _ in changes]:
            raise LongseqError(
                f"{place}: {text} changes position {position} ({match[1]}) twice; leave one of them out."
            )
        changes.append((position, old, new))
    return Variant(text, tuple(changes))


def _lines(file: Path | None) -> Iterator[tuple[str, str]]:
    if file is None:
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise LongseqError(f"{explained(error, file, 'cannot be read')}.") from None
    except UnicodeDecodeError:
        raise LongseqError(f"{file}: not text; give a file with one variant per line.") from None
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].replace(",", " ").split()
        if words:
            yield words[0], f"{file}, line {number}"
