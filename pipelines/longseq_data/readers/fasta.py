"""FASTA: records read as a stream, turned into residue ids, and checked before a run.

Biopython parses; what is added here is the line number of every problem.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from longseq_data.errors import DataError
from longseq_data.vocabulary import PROTEINS, UNKNOWN, Alphabet, Tokens

from .documents import DocumentEncoder
from .sources import open_text, reading_error

UNKNOWN_BYTE = bytes([UNKNOWN])
PRINTABLE = bytes(range(32, 127))

HOLLOW = "tokens=0"  # how `longseq sample` marks a sequence that ended before its first residue

NUCLEOTIDES = b"ACGTUNacgtun"
PEPTIDE = 10  # residues; fewer may be of these letters by chance
NUCLEOTIDES_SENTENCE = (
    "every residue is A, C, G, T, U or N, so these are probably nucleotides, read as the amino acids of the same "
    "letters; train on the files with data.tokenizer=dna, or translate them into proteins first."
)

PIR = re.compile(rb">(P1|F1|DL|DC|RL|RC|N1|N3|XX);")  # how a record of that format begins

# What begins a line of its own, met inside a sequence -> how it came there, and what to do.
MISPLACED = {
    ">": "'>' inside a sequence: a line break before it is missing, or it is indented; put it at the start of a line.",
    ";": "';' in a sequence: comments are no part of FASTA any more; remove the lines that begin with ';'.",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One protein; ``line`` is the line of its FASTA header, counted from 1."""

    identifier: str  # first word of the header
    description: str  # the whole header line, without '>'
    sequence: str  # as written, without white space and the final '*'
    source: str
    line: int
    counted: Literal["headers", "lines", "rows"] = "headers"  # what ``line`` counts, where it is no FASTA

    closed: ClassVar[bool] = True

    @property
    def length(self) -> int:
        return len(self.sequence)

    @property
    def held(self) -> int:
        return len(self.sequence)

    @property
    def letters(self) -> bytes:
        return self.sequence.encode("ascii")

    def part(self, start: int, stop: int | None) -> bytes:
        """The letters of residues [start, stop)."""
        return self.sequence[start:stop].encode("ascii")

    def place_of(self, offset: int) -> tuple[str, int]:
        """Where residue ``offset`` is written: ("line" or "row", its number)."""
        if self.counted != "headers":
            return self.counted.removesuffix("s"), self.line
        return "line", _line_of(self.source, self.line, offset)


def read_records(source: str) -> Generator[Record, None, None]:
    """Stream the records of one path or URL, plain or gzipped.

    Raises DataError, one sentence with file and line, for what cannot be read, is no FASTA, or holds a record without
    an identifier or without residues, unless its header says tokens=0: a model may draw nothing at all. Letters outside
    the alphabet pass: Encoder deals with them.
    """
    with open_text(source) as handle:
        yield from parse_records(handle, source)


def parse_records(handle: Iterable[str], source: str, first_line: int = 1) -> Iterator[Record]:
    """The records of some lines of ``source``, the first of which has the number ``first_line``; raises as above."""
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    headers: deque[int] = deque()  # the parser is one header ahead of the record that it yields
    for title, sequence in SimpleFastaParser(_lines(handle, source, headers, first_line)):
        line = headers.popleft()
        # bytes.isalpha is the fastest test that there is; the slow road is for the few that fail it
        if not (sequence.isascii() and sequence.encode().isalpha()):
            sequence = _unusual(title, sequence, source, line)
        words = title.split(None, 1)
        if not words:
            raise DataError(f"{source}, line {line}: the header has no identifier; write one after the '>'.")
        yield Record(words[0], title, sequence, source, line)


def _lines(handle: Iterable[str], source: str, headers: deque[int], first_line: int) -> Iterator[str]:
    """The lines from the first header on; ``headers`` receives the line number of each header."""
    number = 0
    numbered = enumerate(handle, first_line)
    try:
        for number, line in numbered:
            if line[0] == ">":
                headers.append(number)
                yield line
                break
            if line.lstrip()[:1] in MISPLACED:
                raise DataError(f"{source}, line {number}: {MISPLACED[line.lstrip()[0]]}")
            if line.strip():
                raise DataError(
                    f"{source}, line {number}: text before the first header ('>identifier'), so this is no FASTA file; "
                    f"give FASTA, or add the missing header."
                )
        else:
            raise DataError(f"{source}, line {max(number, 1)}: nothing but blank lines to the end; give FASTA records.")
        for number, line in numbered:
            if line[0] == ">":
                headers.append(number)
            yield line
    except DataError:
        raise
    except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
        raise reading_error(source, number, error) from error


def _unusual(title: str, sequence: str, source: str, line: int) -> str:
    """The sequence without tabs and the final '*' (a stop codon).

    Raises DataError where it is empty and its header does not say so, holds a header or a comment, or is not printable.
    Whole files may end each sequence in '*' or have gaps, so what is legal takes no Python loop over the letters.
    """
    sequence = sequence.replace("\t", "").removesuffix("*")
    if not sequence and HOLLOW not in title.split():
        raise DataError(
            f"{source}, line {line}: record '{title[:60]}' has no residues; remove it, or restore its sequence."
        )
    for mark, sentence in MISPLACED.items():
        if mark in sequence:
            raise DataError(f"{source}, line {_line_of(source, line, sequence.index(mark))}: {sentence}")
    if sequence.encode().translate(None, PRINTABLE):
        offset = next(i for i, letter in enumerate(sequence) if not (letter.isascii() and letter.isprintable()))
        raise DataError(
            f"{source}, line {_line_of(source, line, offset)}: {_name(sequence[offset])} in a sequence, so this is not "
            f"a FASTA file or it is damaged; export or copy it again."
        )
    return sequence


def _name(character: str) -> str:
    if character == "\ufffd":
        return "a byte that is neither ASCII nor UTF-8"
    return repr(character) if character.isprintable() else f"the control character U+{ord(character):04X}"


def _line_of(source: str, header: int, offset: int) -> int:
    """The line that holds residue ``offset`` of the record whose header is on line ``header``.

    Reads the source again: only a first problem asks for it, while keeping line lengths would slow down every record.
    An entry of another format than FASTA has annotation between its first line and its residues: it is its first line.
    """
    with open_text(source) as handle:
        for number, line in enumerate(handle, 1):
            if number == header and not line.startswith(">"):
                return header
            if number > header:
                offset -= len(line.rstrip().replace(" ", "").replace("\t", ""))
                if offset < 0:
                    return number
    return header


class Encoder(DocumentEncoder):
    """Turns records into residue ids, and keeps count of the letters that have none.

    strict: refuse such letters (DataError) instead of mapping them to X, or N in DNA.
    tell: gets a sentence about the first one of each source.
    unknown: how often each was mapped to X.
    """

    def __init__(
        self, strict: bool, tell: Callable[[str], object] | None = None, alphabet: Alphabet = PROTEINS
    ) -> None:
        super().__init__(alphabet.vocabulary)
        self.alphabet = alphabet
        self._to_other = bytes.maketrans(UNKNOWN_BYTE, bytes([alphabet.letters.index(alphabet.other)]))
        self._known = bytes(byte for byte in range(256) if alphabet.table[byte] != UNKNOWN)
        self.strict = strict
        self.tell = tell
        self.unknown: Counter[str] = Counter()
        self._warned: set[str] = set()  # sources

    def encode(self, record: Record, start: int = 0, stop: int | None = None) -> Tokens:  # type: ignore[override]
        """Ids of residues [start, stop), read-only, shape (stop - start,), all ordinary tokens."""
        letters = record.part(start, stop)
        ids = letters.translate(self.alphabet.table)
        if UNKNOWN_BYTE in ids:
            self._note(record, start, letters, ids)
            ids = ids.translate(self._to_other)
        return np.frombuffer(ids, dtype=np.uint8)

    def _note(self, record: Record, start: int, letters: bytes, ids: bytes) -> None:
        first = start + ids.index(UNKNOWN_BYTE)
        if self.strict:
            known = self.alphabet.letters
            raise DataError(
                f"{record.source}, {' '.join(map(str, record.place_of(first)))}: character "
                f"'{record.sequence[first]}' in record '{record.identifier}' is not one of {known}; correct it, or set "
                f"data.strict=false, which maps such characters to {self.alphabet.other}."
            )
        self.unknown.update(letters.translate(None, self._known).decode().upper())
        if self.tell and record.source not in self._warned:
            self._warned.add(record.source)
            # the line of the header: that of the letter would take reading the source again, while training waits
            self.tell(
                f"{record.source}, {'row' if record.counted == 'rows' else 'line'} {record.line}: "
                f"'{record.sequence[first]}' in record '{record.identifier}' is read as {self.alphabet.other}; "
                f"data.strict=true refuses it."
            )
