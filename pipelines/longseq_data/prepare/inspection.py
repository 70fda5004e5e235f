"""What is in a corpus, or in files that may become one: counts and lengths, as text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import (
    Lengths,
    Manifest,
    count_lengths,
    describe_lengths,
    histogram_lines,
    read_manifest,
)
from longseq_data.errors import in_line
from longseq_data.ingest.parse import parse_lot, read_lots
from longseq_data.ingest.survey import UNITS
from longseq_data.readers.documents import Document, DocumentEncoder
from longseq_data.readers.fasta import NUCLEOTIDES_SENTENCE, PEPTIDE, Encoder
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.reading import FASTA, Reading
from longseq_data.readers.uniprot import parse_header
from longseq_data.vocabulary import ALPHABETS, PROTEIN, PROTEINS, Tokens, Vocabulary

from .map_stage import NUCLEOTIDE_IDS

SHOWN = 60  # tokens of a record


@dataclass
class RawCounts:
    """What sequence files hold."""

    records: int = 0
    tokens: int = 0
    unknown: Counter[str] = field(default_factory=Counter)  # letters outside the alphabet
    proteins: bool = False  # whether any record has a letter that nucleotides do not have
    lengths: Lengths = field(default_factory=Lengths)
    first: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)  # (id, tokens, header) of some


def count(sources: Sequence[str], show: int, progress: Callable[[int], object] | None = None) -> RawCounts:
    """Read sequence files once. ``show``: how many of the first records to keep. ``progress``: gets the bytes read.

    Raises DataError as preparing them would.
    """
    counts, encoder = RawCounts(), FASTA.encoder(strict=False)
    assert isinstance(encoder, Encoder)
    watch = None if progress is None else lambda piece: progress(len(piece))
    by_length: Counter[int] = Counter()
    shortest, longest = 1 << 62, 0
    for leaf in FASTA.leaves(sources):
        for lot in read_lots(FASTA, leaf, strict=False, watch=watch):
            for records in parse_lot(FASTA, leaf, lot, encoder, strict=False):
                lengths = np.array(records.held, dtype=np.int64)
                counts.records += lengths.size
                counts.tokens += int(lengths.sum())
                counts.proteins = counts.proteins or any(row.translate(None, NUCLEOTIDE_IDS) for row in records.tokens)
                by_length.update(count_lengths(lengths))
                shortest, longest = min([shortest, *records.held]), max([longest, *records.held])
                some = zip(records.identifiers, records.tokens, records.headers or (), strict=False)
                counts.first += itertools.islice(some, show - len(counts.first))
    counts.unknown = encoder.unknown
    counts.lengths = describe_lengths(dict(by_length), shortest, longest)
    return counts


def raw_lines(sources: Sequence[str], counts: RawCounts) -> Iterator[str]:
    yield f"{len(sources)} file{'s' * (len(sources) > 1)}: {counts.records:,} records, {counts.tokens:,} residues"
    if counts.tokens >= PEPTIDE and not counts.proteins:
        yield f"  warning    {NUCLEOTIDES_SENTENCE}"
    yield from _unknown_lines(dict(counts.unknown))
    yield from length_lines(counts.lengths, counts.tokens, counts.records)
    for name, tokens, line in counts.first:
        header = parse_header(line.decode())
        members = f"{header.members:,} member{'s' * (header.members != 1)}" if header.members is not None else ""
        known = ", ".join(filter(None, (header.taxon, members)))
        taxon = f"TaxID {'unknown' if header.taxid is None else header.taxid}{f' ({known})' if known else ''}"
        yield _line(name.decode(), taxon, np.frombuffer(tokens, np.uint8), PROTEIN)


def document_lines(read: Reading, sources: Sequence[str], show: int) -> Iterator[str]:
    """What texts, tables and pictures hold as their tokens, read once, with the first ``show`` documents.

    Raises DataError as training on them would.
    """
    encoder = read.encoder(strict=False)
    by_length: Counter[int] = Counter()
    first: list[str] = []
    leaves = read.leaves(sources)
    for leaf in leaves:
        documents = read_proteins(leaf.source) if leaf.format == "fasta" else read.documents(leaf, strict=False)
        with closing(documents):
            for document in documents:
                by_length[document.length] += 1
                if len(first) < show:
                    first.append(_document_line(document, encoder))
    records, tokens = by_length.total(), sum(length * number for length, number in by_length.items())
    unit = {"bytes": "bytes of text", **UNITS}.get(read.tokens, "tokens")
    yield f"{len(leaves)} file{'s' * (len(leaves) > 1)}: {records:,} records, {tokens:,} {unit}"
    if mistaken := read.mistaken(leaves):
        yield f"  warning    {mistaken}"
    if isinstance(encoder, Encoder):
        yield from _unknown_lines(dict(encoder.unknown), encoder.alphabet.other)
    yield from length_lines(describe_lengths(dict(by_length), min(by_length), max(by_length)), tokens, records)
    yield from first


def _document_line(document: Document, encoder: DocumentEncoder) -> str:
    """A document's name, length and beginning."""
    start = encoder.encode(document, 0, min(document.length, 4 * SHOWN))
    return _line(document.identifier, "", start, encoder.vocabulary, document.length)


def _line(identifier: str, taxon: str, tokens: Tokens, vocabulary: Vocabulary, length: int | None = None) -> str:
    """A record's name, taxon, length and beginning. tokens: at least that."""
    start, size = tokens[: 4 * SHOWN], len(tokens) if length is None else length
    name = vocabulary.name
    if name in ALPHABETS:
        shown = ALPHABETS[name].decode(start.tolist())
    elif name == "pixels":
        shown = " ".join(map(str, start.tolist()))
    elif name == "bytes":
        shown = bytes(start.astype(np.uint8)).decode("utf-8", "replace")
    else:
        from longseq_data.tokenization import load_tokenizer

        shown = load_tokenizer(name).decode(start.tolist())
    shown = in_line(shown)
    more = "…" if len(shown) > SHOWN else ""
    return "  ".join(("", in_line(identifier), *([taxon] if taxon else []), f"{size:,}", f"{shown[:SHOWN]}{more}"))


def corpus_lines(folder: Path, show: int) -> Iterator[str]:
    """A prepared corpus, with the first ``show`` records of each split."""
    manifest = read_manifest(folder)
    yield from report_lines(str(folder), manifest)
    for split in manifest.splits if show else ():
        corpus = Corpus.open(folder, split)
        yield f"\n{split}:"
        for identifier, tokens, taxid in corpus.rows(0, min(show, len(corpus))):
            taxon = f"TaxID {taxid if taxid >= 0 else 'unknown'}" if manifest.vocabulary.name == "protein" else ""
            yield _line(identifier, taxon, tokens, manifest.vocabulary)


def report_lines(name: str, manifest: Manifest) -> Iterator[str]:
    """What became of the sources, and what is in the splits."""
    report, unit = manifest.report, {"bytes": "bytes of text", **UNITS}.get(manifest.vocabulary.name, "tokens")
    split_by = str(manifest.settings.get("split_by", "id"))
    files = len(manifest.sources)
    records = sum(split.records for split in manifest.splits.values())
    tokens = sum(split.tokens for split in manifest.splits.values())
    yield f"{name}: {records:,} records, {tokens:,} {unit}, fingerprint {manifest.fingerprint[:16]}"
    yield f"  read       {report['records']:,} records, {report['tokens']:,} {unit}, {files} file{'s' * (files > 1)}"
    if report.get("nucleotides"):
        yield f"  warning    {NUCLEOTIDES_SENTENCE}"
    dropped = {"duplicates": report["duplicates"], **report["filtered"]}  # type: ignore[dict-item]
    for reason, number in dropped.items():
        if number:
            yield f"  dropped    {number:,} {reason}"
    alphabet = ALPHABETS.get(manifest.vocabulary.name, PROTEINS)
    yield from _unknown_lines(report["unknown_letters"], alphabet.other)  # type: ignore[arg-type]
    if repeated := report.get("repeated_ids"):
        how = {"id": "equal ones are in one split", "cluster": "clusters decide the splits"}
        yield (
            f"  note       {repeated['again']:,} of {repeated['records']:,} records have an id that others have "  # type: ignore[index]
            f"({in_line(repeated['first'])[:40]}): {how.get(split_by, 'a hash of the sequences decides the splits')}"  # type: ignore[index]
        )
    if clusters := report.get("clusters"):
        yield f"  clusters   {', '.join(_cluster_words(clusters))}"  # type: ignore[arg-type]
    if report["held_out_families"]:
        yield f"  held out   families {', '.join(report['held_out_families'])}"  # type: ignore[arg-type]
    if (report["held_out_names"] or manifest.settings.get("ood_taxids")) and "ood" not in manifest.splits:
        yield "  held out   nothing: no record is on the list, or of the TaxIDs; there is no ood split"
    for name in ("valid", "test"):
        if manifest.settings.get(f"{name}_fraction") and name not in manifest.splits:
            yield f"  no {name:<8} the records are too few for {name}_fraction={manifest.settings[f'{name}_fraction']}"
    for split, info in manifest.splits.items():
        share = 100 * info.records / records
        yield f"  {split:<10} {info.records:,} records ({share:.1f} %), {info.tokens:,} {unit}"
    for split, info in manifest.splits.items():
        yield f"\n{split} lengths:"
        yield from length_lines(info.lengths, info.tokens, info.records)


def _cluster_words(clusters: dict[str, int]) -> Iterator[str]:
    if "rows" in clusters:
        yield f"{clusters['rows']:,} rows of the table"
    elif clusters:
        yield f"{clusters['clusters']:,} by {clusters['program']}"
        yield f"{clusters['moved']:,} held-out records went to train, with relatives there"
        yield f"{clusters['searches']} searches until there was none"


def length_lines(lengths: Lengths, tokens: int, records: int) -> Iterator[str]:
    quantiles = ", ".join(f"{percent} % {length:,}" for percent, length in lengths.quantiles.items())
    yield f"  {lengths.shortest:,} to {lengths.longest:,}, mean {tokens / max(records, 1):,.1f}; up to: {quantiles}"
    yield from histogram_lines(lengths.histogram)


def _unknown_lines(unknown: dict[str, int], other: str = "X") -> Iterator[str]:
    if unknown:
        letters = ", ".join(f"{letter!r} {number:,}" for letter, number in sorted(unknown.items()))
        yield f"  unknown    {letters}: read as {other}"
