"""One door to every protein format: FASTA, UniProtKB flat text (.dat), UniProtKB XML and UniRef XML."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Generator, Iterator
from typing import Literal, TextIO

from longseq_data.errors import DataError

from .fasta import PIR, Record, parse_records
from .sources import Watch, as_text, open_binary
from .uniprot_flat import read_flat
from .uniprot_xml import read_xml

Format = Literal["fasta", "dat", "xml"]

READERS: dict[Format, Callable[[TextIO, str], Iterator[Record]]] = {
    "fasta": parse_records,
    "dat": read_flat,
    "xml": read_xml,
}

ENTRY = re.compile(rb"ID {3}\S")


def read_proteins(source: str, watch: Watch | None = None) -> Generator[Record, None, None]:
    """Stream the records of one path or URL, plain or gzipped, in the format that its first bytes show.

    Flat text and XML give the header that the same entry has in UniProt's FASTA, so an entry has one identifier,
    whatever file it comes in, and ``parse_header`` reads its taxonomy. Memory does not depend on the file's size.

    Raises DataError, one sentence with file and line, for what cannot be read, is none of the formats, or is damaged.
    """
    with open_binary(source, "FASTA", watch) as handle:
        yield from records_of(handle, source)


def records_of(handle: io.BufferedReader, source: str) -> Iterator[Record]:
    """The same of a source that is open."""
    text = as_text(handle)
    yield from READERS[_format_of(text, source)](text, source)


def _format_of(handle: TextIO, source: str) -> Format:
    # open_binary has filled the buffer, so nothing is read here
    head = handle.buffer.peek(1024).removeprefix(codecs.BOM_UTF8).lstrip()  # type: ignore[attr-defined]
    if head.startswith(b"<"):
        return "xml"
    if ENTRY.match(head):
        return "dat"
    if PIR.match(head):
        raise DataError(
            f"{source}, line 1: PIR format, whose second line is a description and no sequence; convert it, for "
            "example with Biopython: SeqIO.convert('OLD', 'pir', 'NEW', 'fasta')."
        )
    if head[:1] in (b">", b";", b""):  # the FASTA reader has a sentence for the last two
        return "fasta"
    raise DataError(
        f"{source}, line 1: begins neither like FASTA ('>identifier') nor like UniProtKB flat text ('ID   entry') nor "
        f"like XML ('<'); give one of these, plain or gzipped."
    )
