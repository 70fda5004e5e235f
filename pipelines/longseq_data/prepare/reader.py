"""From sequence files to rows of a corpus: sources are cut into blocks by one reader, and parsed by many workers.

A block is the text of whole records. It is shipped as it stands; taking the records out of it is the workers' share.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from longseq_data.errors import DataError
from longseq_data.readers.fasta import KNOWN, UNKNOWN_BYTE, UNKNOWN_TO_X, Record, _line_of, parse_records
from longseq_data.readers.fasta_blocks import begins_with_record, plain_ids, with_line_feeds
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.sources import open_binary, reading_error
from longseq_data.readers.uniprot import parse_header, taxid_of
from longseq_data.vocabulary import LETTERS, PROTEIN, TABLE, Vocabulary

READ_SIZE = 1 << 20
PARSED = 1 << 19  # bytes of a block that are parsed at once
LONGEST = 1 << 30  # bytes of one record; beyond, memory would end before the file does
NO_TAXID = -1
SPACES = b"\n "


class Row(NamedTuple):
    """One record as a corpus keeps it; ``tokens`` holds ids in the vocabulary's dtype."""

    identifier: str
    tokens: bytes
    taxid: int
    cluster: str = ""  # RepID of the header, where the reader was asked for it


class Reader(Protocol):
    """How records of one kind become rows."""

    vocabulary: Vocabulary

    def whole(self, source: str) -> Iterator[Row]:
        """All rows of a source that is not cut into blocks."""

    def block(self, block: Block) -> Iterator[Row]:
        """The rows of a block."""


@dataclass(frozen=True)
class Block:
    """Whole records of FASTA text: lines end in LF, the first one begins with '>'."""

    source: str
    number: int  # of the block in its source, from 0
    first_line: int
    text: bytes
    checksum: int  # CRC-32 of the text


@dataclass
class Stored:
    """What a source is made of, known once it has been read to its end."""

    size: int = 0
    sha256: str = ""
    blocks: int = 0  # 0: the source is no plain FASTA, and is read whole by one worker


def cut(
    source: str,
    block_bytes: int,
    stored: Stored,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Block]:
    """Read a FASTA source once, in blocks of about ``block_bytes``, and fill ``stored`` at the end.

    Yields nothing of a source that does not begin with a record: ``Reader.whole`` reads it, or says what is wrong.
    ``progress`` is called with the number of bytes of the source that were read. Raises DataError for a source that
    cannot be read, and for a record beyond LONGEST.
    """
    digest = hashlib.sha256()

    def watch(piece: memoryview) -> None:
        digest.update(piece)
        stored.size += len(piece)
        if progress is not None:
            progress(len(piece))

    with open_binary(source, "FASTA", watch) as handle:
        if not begins_with_record(handle):
            return
        for text, first_line in _texts(with_line_feeds(_even(handle)), source, block_bytes):
            yield Block(source, stored.blocks, first_line, text, zlib.crc32(text))
            stored.blocks += 1
    stored.sha256 = digest.hexdigest()


def checksum(source: str) -> Stored:
    """Size and SHA-256 of a source that is read whole; raises DataError where it cannot be read."""
    digest = hashlib.sha256()
    stored = Stored()

    def watch(piece: memoryview) -> None:
        digest.update(piece)
        stored.size += len(piece)

    with open_binary(source, "FASTA", watch) as handle:
        try:
            while handle.read(READ_SIZE):
                pass
        except Exception as error:
            raise reading_error(source, None, error) from error
    stored.sha256 = digest.hexdigest()
    return stored


def _even(handle: io.BufferedReader) -> Iterator[bytes]:
    """Pieces of READ_SIZE, so that blocks do not depend on how a source comes; the last one, also before an error, is
    shorter."""
    held = bytearray()
    try:
        while piece := handle.read1(READ_SIZE - len(held)):
            held += piece
            if len(held) == READ_SIZE:
                yield bytes(held)
                held.clear()
    except Exception:
        yield bytes(held)
        raise
    yield bytes(held)


def _texts(pieces: Iterable[bytes], source: str, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(text that ends before a '>' that begins a line, the number of its first line)."""
    buffer = bytearray()
    searched, line = 0, 1
    try:
        for piece in pieces:
            buffer += piece
            if len(buffer) < block_bytes + searched:
                continue
            border = buffer.rfind(b"\n>", searched)
            if border < 0:
                if len(buffer) > LONGEST:
                    most = f"{LONGEST >> 20:,} MiB"
                    raise DataError(f"{source}: a record is longer than {most}; check that it is FASTA, or cut it.")
                searched = len(buffer) - 1
                continue
            text = bytes(buffer[: border + 1])
            yield text, line
            line += text.count(b"\n")
            del buffer[: border + 1]
            searched = 0
    except DataError:
        raise
    except Exception as error:  # gzip's, the network's, or those of a filesystem plugin
        raise reading_error(source, line - 1 + buffer.count(b"\n"), error) from error
    if buffer:
        yield bytes(buffer), line


@dataclass
class ProteinReader:
    """Rows of protein records, and a count of the letters that have no token.

    refuse: raise DataError for such a letter instead of reading it as X.
    unknown: how often each was read as X.
    repids: rows have the RepIDs of their headers.
    """

    refuse: bool = False
    repids: bool = False
    unknown: Counter[str] = field(default_factory=Counter)
    vocabulary: Vocabulary = PROTEIN

    def whole(self, source: str) -> Iterator[Row]:
        """The rows of ``read_proteins(source)``, and its errors."""
        return map(self._row, read_proteins(source))

    def block(self, block: Block) -> Iterator[Row]:
        """The rows of a block: those that read_proteins would give, and its errors, several times as fast."""
        line, first = block.first_line, 0
        while first < len(block.text):
            end = (block.text.find(b"\n>", first + PARSED) + 1) or len(block.text)
            text, first = block.text[first:end], end
            found = plain_ids(text, SPACES, with_headers=True)
            if found is None:
                yield from self._one_by_one(text, block.source, line)
            else:
                titles = b"\n".join(found[1]).decode("ascii").split("\n")
                names = [title.split(None, 1)[0] for title in titles]
                clusters = list(map(self._repid, titles)) if self.repids else [""] * len(titles)
                yield from map(Row._make, zip(names, found[0], map(taxid, titles), clusters, strict=True))
            line += text.count(b"\n")

    def _one_by_one(self, text: bytes, source: str, line: int) -> Iterator[Row]:
        for part in text[1:].split(b"\n>"):
            header, _, body = part.partition(b"\n")
            tokens = body.translate(TABLE, SPACES)
            title = header.decode("utf-8", "replace")
            words = title.split(None, 1)
            if not words or not tokens or UNKNOWN_BYTE in tokens:
                record = io.StringIO(">" + part.decode("utf-8", "replace") + "\n")
                yield from map(self._row, parse_records(record, source, line))
            else:
                yield Row(words[0], tokens, taxid(title), self._repid(title))
            line += part.count(b"\n") + 1

    def _row(self, record: Record) -> Row:
        letters = record.sequence.encode("ascii")
        tokens = letters.translate(TABLE)
        if UNKNOWN_BYTE in tokens:
            if self.refuse:
                first = tokens.index(UNKNOWN_BYTE)
                raise DataError(
                    f"{record.source}, line {_line_of(record.source, record.line, first)}: character "
                    f"'{record.sequence[first]}' in record '{record.identifier}' is none of {LETTERS}; correct it, or "
                    f"set unknown=x, which reads such characters as X."
                )
            self.unknown.update(letters.translate(None, KNOWN).decode().upper())
            tokens = tokens.translate(UNKNOWN_TO_X)
        return Row(record.identifier, tokens, taxid(record.description), self._repid(record.description))

    def _repid(self, header: str) -> str:
        return (parse_header(header).representative or "") if self.repids else ""


def taxid(header: str) -> int:
    """The TaxID that ``parse_header`` reads; NO_TAXID without one."""
    found = taxid_of(header)
    return NO_TAXID if found is None else found
