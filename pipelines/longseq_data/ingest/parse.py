"""The blocks of one source: the only place where a source becomes tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from longseq_data.readers.documents import DocumentEncoder, Text
from longseq_data.readers.fasta import Encoder, Record
from longseq_data.readers.fasta_blocks import Piece, Protein, parse_piece, read_pieces
from longseq_data.readers.formats import Leaf
from longseq_data.readers.images import ImageDocument
from longseq_data.readers.reading import Raw, Reading, nothing_in
from longseq_data.readers.sources import Watch

from .block import Block, Builder, Records, stored_dtype

SOME, SOME_BYTES = 256, 1 << 20  # documents at a time, of those that are read one by one

Lot = Piece | list[Raw]  # some records of a source as they are read


def parsed(reading: Reading, leaf: Leaf, *, strict: bool, watch: Watch | None = None) -> Generator[Block, None, None]:
    """The blocks of a leaf, in their order; before an error those of the records before it.

    They are a function of the leaf's content, ``reading`` and ``strict``.

    watch: sees the bytes of the source, as they are stored, where it is read from front to back.

    Raises DataError, one sentence with file and line or row.
    """
    builder = Builder(reading.vocabulary)
    encoder = reading.encoder(strict, tell=lambda note: builder.notes.append(note))
    if isinstance(encoder, Encoder):
        encoder.unknown = builder.unknown
    empty = True
    with closing(read_lots(reading, leaf, strict=strict, watch=watch)) as lots:
        try:
            for lot in lots:
                for records in parse_lot(reading, leaf, lot, encoder, strict=strict):
                    empty = empty and not records.tokens
                    yield from builder.add(records)
            if empty and leaf.format != "fasta" and reading.tokens != "pixels":
                raise nothing_in(leaf)
        except Exception:
            yield from builder.rest()
            raise
    yield from builder.rest()


def read_lots(reading: Reading, leaf: Leaf, *, strict: bool, watch: Watch | None = None) -> Generator[Lot, None, None]:
    """A leaf as it is read, some records at a time; before an error those that come before it.

    Raises as ``parsed``.
    """
    if leaf.format == "fasta":
        yield from read_pieces(leaf.source, watch)
        return
    some: list[Raw] = []
    size = 0
    try:
        for raw in reading.raw(leaf, strict, watch):
            some.append(raw)
            size += raw_bytes(raw)
            if len(some) >= SOME or size >= SOME_BYTES:
                yield some
                some, size = [], 0
    except Exception:
        yield some
        raise
    yield some


def raw_bytes(raw: Raw) -> int:
    """What it holds of memory, about."""
    return len(raw.data) if isinstance(raw, Text) else raw.held


def parse_lot(
    reading: Reading, leaf: Leaf, lot: Lot, encoder: DocumentEncoder, *, strict: bool
) -> Generator[Records, None, None]:
    """The records of ``read_lots`` as tokens; before an error those that come before it. Raises as ``parsed``."""
    if isinstance(lot, Piece):
        for bulk, records in parse_piece(lot, leaf.source, proteins=reading.tokens == "protein"):
            if bulk is not None:
                yield Records(None, bulk.ids, headers=bulk.headers)
                continue
            yield from _encoded(records, encoder)
        return
    dtype, written = stored_dtype(reading.vocabulary), reading.written
    names: list[bytes] = []
    held: list[int] = []
    some = Records(names, [], held, [] if written else None)
    try:
        for raw in lot:
            tokens = reading.tokens_of(raw, leaf, encoder, strict)
            if not len(tokens):
                continue
            names.append(raw.identifier.encode("utf-8", "surrogateescape"))
            some.tokens.append(tokens.astype(dtype, copy=False).tobytes())
            held.append(raw.held if isinstance(raw, ImageDocument) else tokens.nbytes if written else len(tokens))
            if isinstance(raw, Text) and some.texts is not None:
                some.texts.append(raw.data)
    except Exception:
        yield some
        raise
    yield some


def _encoded(records: list[Protein | Record], encoder: DocumentEncoder) -> Iterator[Records]:
    tokens: list[bytes] = []
    try:
        for record in records:
            tokens.append(encoder.encode(record).tobytes())  # noqa: PERF401
    finally:  # what comes before a letter that is refused is whole
        some = records[: len(tokens)]
        headers = [record.description.encode() for record in some]
        yield Records([record.identifier.encode() for record in some], tokens, headers=headers)
