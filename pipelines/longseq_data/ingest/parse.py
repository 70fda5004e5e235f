"""The blocks of one source: the only place where a source becomes tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from longseq_data.readers.documents import DocumentEncoder
from longseq_data.readers.fasta import Encoder, Record
from longseq_data.readers.fasta_blocks import Protein, read_bulk
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading
from longseq_data.readers.sources import Watch

from .block import Block, Builder, Records, stored_dtype

SOME = 256  # documents at a time, of those that are read one by one


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
    fasta = leaf.format == "fasta"
    bulk = reading.tokens == "protein"
    read = _sequences(leaf.source, encoder, watch, bulk) if fasta else _documents(reading, leaf, strict, encoder, watch)
    with closing(read):
        try:
            for records in read:
                yield from builder.add(records)
        except Exception:
            yield from builder.rest()
            raise
    yield from builder.rest()


def _sequences(
    source: str, encoder: DocumentEncoder, watch: Watch | None, proteins: bool
) -> Generator[Records, None, None]:
    with closing(read_bulk(source, watch, proteins=proteins)) as read:
        for bulk, records in read:
            if bulk is not None:
                yield Records(bulk.identifiers, bulk.ids, list(map(len, bulk.ids)))
                continue
            yield from _encoded(records, encoder)


def _encoded(records: list[Protein | Record], encoder: DocumentEncoder) -> Iterator[Records]:
    tokens: list[bytes] = []
    try:
        for record in records:
            tokens.append(encoder.encode(record).tobytes())  # noqa: PERF401
    finally:  # what comes before a letter that is refused is whole
        some = records[: len(tokens)]
        yield Records([record.identifier.encode() for record in some], tokens, list(map(len, tokens)))


def _documents(
    reading: Reading, leaf: Leaf, strict: bool, encoder: DocumentEncoder, watch: Watch | None
) -> Generator[Records, None, None]:
    """A few at a time; before an error those that came before it."""
    dtype, written = stored_dtype(reading.vocabulary), reading.written
    some = Records([], [], [], [] if written else None)
    with closing(reading.documents(leaf, strict=strict, watch=watch)) as documents:
        try:
            for document in documents:
                tokens = encoder.encode(document)
                some.identifiers.append(document.identifier.encode("utf-8", "surrogateescape"))
                some.tokens.append(tokens.astype(dtype, copy=False).tobytes())
                some.held.append(document.held)
                if some.texts is not None:
                    some.texts.append(document.text)  # type: ignore[attr-defined]
                if len(some.tokens) >= SOME:
                    yield some
                    some = Records([], [], [], [] if written else None)
        except Exception:
            yield some
            raise
    yield some
