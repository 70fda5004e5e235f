"""The records of a protein file as blocks hold them, and as its lines give them."""

from __future__ import annotations

from longseq_data.errors import DataError
from longseq_data.ingest.parse import parsed
from longseq_data.readers.fasta import Encoder
from longseq_data.readers.formats import Leaf
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.reading import FASTA

Said = list[tuple[str, bytes] | str]  # (identifier, ids) of each record, and the sentence that ends them


def in_blocks(source: str) -> Said:
    found: Said = []
    try:
        for block in parsed(FASTA, Leaf(source, "fasta"), strict=False):
            names = [block.identifiers[row].decode() for row in range(len(block))]
            found += zip(names, block.ids(range(len(block))), strict=True)
    except DataError as error:
        found.append(str(error))
    return found


def by_line(source: str) -> Said:
    found: Said = []
    encoder = Encoder(strict=False)
    try:
        for record in read_proteins(source):
            found.append((record.identifier, encoder.encode(record).tobytes()))
    except DataError as error:
        found.append(str(error))
    return found
