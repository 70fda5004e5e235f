"""A look at the beginning of every source before a run is started, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longseq_data.splits import SplitRule
from longseq_data.vocabulary import ALPHABETS, PROTEINS

from .documents import Document
from .fasta import EVERYTHING, MIB, Encoder, Record, ScanReport, scan
from .formats import Leaf
from .images import ImageDocument
from .proteins import read_proteins
from .reading import TOKENS, Reading

UNITS = {"protein": "residues", "dna": "bases", "pixels": "colour values"}
HUB_BYTES = 4 * MIB  # of each dataset, as they come over the network
DECODED = 4  # pictures of each folder or table


def survey(
    reading: Reading,
    sources: Sequence[str],
    *,
    strict: bool,
    max_bytes: int = 16 * MIB,
    total_bytes: int = 64 * MIB,
    rule: SplitRule = EVERYTHING,
) -> ScanReport:
    """What fasta.scan does for proteins, for every format: what is wrong should be said in a run's first second.

    Reads at most ``max_bytes`` of each file and ``total_bytes`` of all, but something of each source in any case. Texts
    are not tokenised and few pictures decoded, for speed. Raises the readers' DataErrors.
    """
    opened = [(source, reading.leaves([source])) for source in sources]
    alphabet = ALPHABETS.get(reading.tokens, PROTEINS)
    if all(leaf.format == "fasta" for _, leaves in opened for leaf in leaves):
        return scan(
            sources,
            strict=strict,
            max_bytes=max_bytes,
            total_bytes=total_bytes,
            read=read_proteins,
            rule=rule,
            alphabet=alphabet,
        )
    report = ScanReport(unit=UNITS.get(reading.tokens, "bytes of text"), other=alphabet.other)
    encoder = Encoder(strict, alphabet=alphabet)
    for _, leaves in opened:
        for number, leaf in enumerate(leaves):
            if number and report.residues >= total_bytes:
                report.complete = False
                break
            _look(reading, leaf, strict, HUB_BYTES if leaf.format == "hub" else max_bytes, rule, encoder, report)
    report.unknown, report.first_unknown = encoder.unknown, encoder.first_unknown
    return report


def _look(
    reading: Reading,
    leaf: Leaf,
    strict: bool,
    most: int,
    rule: SplitRule,
    encoder: Encoder,
    report: ScanReport,
) -> None:
    seen = 0
    for number, document in enumerate(_documents(reading, leaf, strict)):
        if seen >= most:
            report.complete = False
            return
        if isinstance(document, ImageDocument) and number < DECODED:
            document.encode(0, None)
        residues = None
        if isinstance(document, Record):
            residues = encoder.encode(document).tobytes
            report.look_at(document)
        # a folder's pictures are named without being read; those of tables are read with their rows
        seen += document.held if leaf.format != "images" else 0
        report.records += 1
        report.residues += document.length
        report.identifiers.add(document.identifier, rule, residues)


def _documents(reading: Reading, leaf: Leaf, strict: bool) -> Iterator[Document]:
    """The leaf's documents; texts for a tokenizer as bytes, but decoded once where ``strict`` asks for UTF-8."""
    if leaf.format == "fasta":
        return read_proteins(leaf.source)
    if reading.tokens in TOKENS:
        return reading.documents(leaf, strict=strict)
    reading.vocabulary  # noqa: B018 - a tokenizer that cannot be read is said now
    return reading.untokenised(leaf, strict)
