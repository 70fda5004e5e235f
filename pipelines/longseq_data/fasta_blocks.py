"""FASTA at the speed of ``bytes``: records by the block, undecoded until somebody asks.

The same records, and the same sentences for what is wrong, as fasta.read_records: what is not plain letters in plain
lines is handed to its parser, record by record.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from typing import ClassVar, NamedTuple

from .fasta import Record, _line_of, parse_records
from .proteins import read_proteins
from .sources import open_binary, reading_error

READ_SIZE = 1 << 17  # small enough for the cache of a core
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


def read_chunks(source: str) -> Generator[Chunk, None, None]:
    """The records of one path or URL, some at a time; raises what read_proteins raises, after the records before it."""
    with open_binary(source, "FASTA") as handle:
        head = handle.peek(4)[:4]
        plain = head.removeprefix(BYTE_ORDER_MARK).startswith(b">")
        if plain:
            if not head.startswith(b">"):
                handle.read(len(BYTE_ORDER_MARK))
            yield from _chunks(handle, source)
    if not plain:
        for record in read_proteins(source):
            yield [record]


def _chunks(handle: io.BufferedReader, source: str) -> Iterator[Chunk]:
    rest: list[bytes] = []
    line = 1
    pieces = _with_line_feeds(handle)
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
            continue
        text, rest = b"".join([*rest, piece[: border + 1]]), [piece[border + 1 :]]
        yield from _parsed(text, source, line)
        line += text.count(b"\n")
    text = b"".join(rest)
    if problem is None:
        yield from _parsed(text, source, line)
        return
    raise reading_error(source, line - 1 + text.count(b"\n"), problem) from problem


def _with_line_feeds(handle: io.BufferedReader) -> Iterator[bytes]:
    """The text in pieces as they come, where CRLF and CR have become LF."""
    held = b""  # a CR at the end of a piece may be the first half of a CRLF
    while piece := handle.read1(READ_SIZE):
        if held or b"\r" in piece:
            piece = held + piece
            held = b"\r" if piece.endswith(b"\r") else b""
            piece = piece[: len(piece) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield piece
    if held:
        yield b"\n"


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
