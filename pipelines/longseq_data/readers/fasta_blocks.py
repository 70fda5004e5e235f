"""FASTA at the speed of ``bytes``: records by the block, undecoded until somebody asks.

The same records, and the same sentences for what is wrong, as fasta.read_records: what is not plain letters in plain
lines is handed to its parser, record by record.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from longseq_data.errors import DataError
from longseq_data.vocabulary import EOS, TABLE

from .fasta import PIR, PRINTABLE, UNKNOWN_BYTE, Record, _line_of, parse_records
from .proteins import records_of
from .sources import Watch, open_binary, reading_error

READ_SIZE = 1 << 19  # parsed at once: what stays in a core's cache
LONGEST = 1 << 30  # bytes of one record; beyond, memory would end before the file does
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# A line that is a header whose identifier stands at once after the '>'.
HEADER = re.compile(rb">(?<![^\n]>)([!-~][^\n]*)\n")
LINE_FEED = ord("\n")
MARK = b">"  # between sequences: none of them holds one
EOS_BYTE = bytes([EOS])
MARKED_TABLE = TABLE[: MARK[0]] + EOS_BYTE + TABLE[MARK[0] + 1 :]
WHITE = PRINTABLE + b"\t"  # in a header of these alone, the white space of bytes is that of str


class _Fields(NamedTuple):
    header: bytes  # without '>'
    letters: bytes  # letters alone
    source: str
    line: int
    length: int
    held: int  # the same: a field is read faster than a property


class Protein(_Fields):
    """A Record that has not been decoded; see there. ``line`` is the line of its header."""

    __slots__ = ()

    closed: ClassVar[bool] = True
    counted: ClassVar[str] = "headers"

    @property
    def description(self) -> str:
        return self.header.decode("utf-8", "replace").rstrip()

    @property
    def identifier(self) -> str:
        return self.description.split(None, 1)[0]

    @property
    def sequence(self) -> str:
        return self.letters.decode("ascii")

    def part(self, start: int, stop: int | None) -> bytes:
        return self.letters[start:stop]

    def place_of(self, offset: int) -> tuple[str, int]:
        return "line", _line_of(self.source, self.line, offset)


Chunk = list["Protein | Record"]


@dataclass(slots=True)
class Piece:
    """Whole records of one source: text that begins with '>', or records of what is no FASTA.

    Who parses it takes the text out: of a genome it is as large as what is made of it.
    """

    text: bytes
    line: int  # its first one
    records: Chunk


class Bulk(NamedTuple):
    """Some records of plain letters."""

    headers: list[bytes]  # without '>'
    ids: list[bytes]


def read_pieces(source: str, watch: Watch | None = None) -> Generator[Piece, None, None]:
    """The records of one path or URL, some at a time, unparsed where it is FASTA.

    Raises what read_proteins raises, after the records before it.
    """
    with open_binary(source, "FASTA", watch) as handle:
        if begins_with_record(handle):
            with closing(_texts(handle, source)) as texts:
                yield from texts
            return
        for record in records_of(handle, source):
            yield Piece(b"", 0, [record])


def parse_piece(piece: Piece, source: str, *, proteins: bool = True) -> Iterator[tuple[Bulk | None, Chunk]]:
    """Its records, some at a time: (plain ones, nothing) or (None, those that need a closer look).

    proteins: whether letters stand for residues of proteins; of another alphabet all need a closer look.

    Raises what read_proteins raises, after the records before it.
    """
    plain = proteins and not piece.records
    found = _one_plain(piece) if plain and piece.text.find(MARK, 1) < 0 else None
    text, piece.text = piece.text, b""
    if found is None and plain:
        found = plain_ids(text)
    if found is not None:
        del text
        yield found, []
        return
    for chunk in [piece.records] if piece.records else _parsed(text, source, piece.line):
        yield None, chunk


def _texts(handle: io.BufferedReader, source: str) -> Generator[Piece, None, None]:
    rest: list[bytes] = []
    line, held = 1, 0
    pieces = with_line_feeds(iter(lambda: handle.read1(READ_SIZE), b""))
    problem: Exception | None = None
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
            piece, problem = None, error
        if piece is None:
            break
        border = piece.rfind(b"\n>")
        if border < 0 and not (rest and rest[-1].endswith(b"\n") and piece.startswith(b">")):
            rest.append(piece)
            held += len(piece)
            if held > LONGEST:
                most = f"{LONGEST >> 20:,} MiB"
                raise DataError(f"{source}: a record is longer than {most}; check that it is FASTA, or cut it.")
            continue
        held = 0
        found, rest = Piece(b"".join([*rest, memoryview(piece)[: border + 1]]), line, []), [piece[border + 1 :]]
        line += _line_breaks(found.text)
        yield found
    found = Piece(b"".join(rest), line, [])
    if problem is None:
        rest.clear()
        yield found
        return
    raise reading_error(source, line - 1 + _line_breaks(found.text), problem) from problem


def _line_breaks(text: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(text, dtype=np.uint8) == LINE_FEED))  # faster than bytes.count


def begins_with_record(handle: io.BufferedReader) -> bool:
    """Whether a file is plain FASTA; if so, a byte order mark before the first '>' is skipped."""
    head = handle.peek(8)[:8]
    first = head.removeprefix(BYTE_ORDER_MARK)
    plain = first.startswith(b">") and not PIR.match(first)
    if plain and not head.startswith(b">"):
        handle.read(len(BYTE_ORDER_MARK))
    return plain


def with_line_feeds(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same text, where CRLF and CR have become LF."""
    held = b""  # a CR at the end of a piece may be the first half of a CRLF
    for piece in pieces:
        if held or b"\r" in piece:
            piece = held + piece
            held = b"\r" if piece.endswith(b"\r") else b""
            piece = piece[: len(piece) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield piece
    if held:
        yield b"\n"


def plain_ids(text: bytes) -> Bulk | None:
    """The records of some text that begins with '>'; None: not all are plain.

    A header that does not fit the pattern leaves its '>', and so one more mark than there are headers that do. White
    space in the headers is that of ``bytes`` alone.
    """
    parts = HEADER.split(text)
    headers = parts[1::2]
    ids = MARK.join(parts[::2]).translate(MARKED_TABLE, b"\n")
    if not ids.startswith(EOS_BYTE) or UNKNOWN_BYTE in ids or b"".join(headers).translate(None, WHITE):
        return None
    items = ids.split(EOS_BYTE)
    del items[0]  # before the first mark
    return Bulk(headers, items) if len(items) == len(headers) and b"" not in items else None


def _one_plain(piece: Piece) -> Bulk | None:
    """The same of a piece of one record, whose text goes on the way: twice its size is in memory at most."""
    found = HEADER.match(piece.text)
    if found is None or found[1].translate(None, WHITE):
        return None
    head, header = found[0], found[1]
    del found  # which holds the text
    body = piece.text[len(head) :]
    piece.text = b""
    ids = body.translate(TABLE, b"\n")
    if ids and UNKNOWN_BYTE not in ids:
        return Bulk([header], [ids])
    piece.text = head + body
    return None


def _parsed(text: bytes, source: str, line: int) -> Iterator[Chunk]:
    """The records of some text that begins with '>'; those before an error come before it."""
    new = tuple.__new__
    chunk: Chunk = []
    try:
        for part in text[1:].split(b"\n>"):
            header, _, body = part.partition(b"\n")
            letters = body.replace(b"\n", b"")
            # letters alone, and an identifier that stands at once after the '>'
            if letters.isalpha() and b" " < header[:1] < b"\x7f":
                chunk.append(new(Protein, (header, letters, source, line, len(letters), len(letters))))
            else:
                whole = io.StringIO(">" + part.decode("utf-8", "replace") + "\n")
                chunk += parse_records(whole, source, line)
            line += part.count(b"\n") + 1
    except BaseException:
        if chunk:
            yield chunk
        raise
    yield chunk
