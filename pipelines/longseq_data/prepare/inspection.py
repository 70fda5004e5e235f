"""What is in a corpus, or in files that may become one: counts and lengths, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

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
from longseq_data.ingest.block import stored_dtype
from longseq_data.ingest.parse import parse_lot, read_lots
from longseq_data.ingest.survey import UNITS
from longseq_data.readers.fasta import NUCLEOTIDES_SENTENCE, PEPTIDE, Encoder
from longseq_data.readers.images import values_of
from longseq_data.readers.reading import Reading, nothing_in
from longseq_data.readers.uniprot import parse_header
from longseq_data.vocabulary import ALPHABETS, PROTEINS, Tokens, Vocabulary

from .map_stage import NUCLEOTIDE_IDS

SHOWN = 60  # tokens of a record

Progress = Callable[[int], object]  # bytes


@dataclass
class RawCounts:
    """What files hold as their tokens."""

    files: int
    records: int = 0
    tokens: int = 0
    unknown: Counter[str] = field(default_factory=Counter)  # letters outside the alphabet
    warnings: list[str] = field(default_factory=list)  # what they probably are instead
    lengths: Lengths = field(default_factory=Lengths)
    first: list[str] = field(default_factory=list)  # lines of some


def count(read: Reading, sources: Sequence[str], show: int, progress: Progress | None = None) -> RawCounts:
    """Read files once. ``show``: how many of the first records to keep. ``progress``: gets the bytes read.

    Raises DataError as training on them would, but for pictures that are not shown: those are not decoded.
    """
    leaves, encoder = read.leaves(sources), read.encoder(strict=False)
    counts, watch = RawCounts(len(leaves)), None if progress is None else lambda piece: progress(len(piece))
    by_length: Counter[int] = Counter()
    shortest, longest, proteins = 1 << 62, 0, read.tokens != "protein"
    for leaf in leaves:
        before = counts.records
        for lot in read_lots(read, leaf, strict=False, watch=watch):
            some, pictures = lot, []
            if isinstance(lot, list) and read.tokens == "pixels":
                pictures = [values_of(read.image_size)] * len(lot)
                some = lot[: show - len(counts.first)]
            for records in parse_lot(read, leaf, some, encoder, strict=False):
                size = stored_dtype(read.vocabulary).itemsize
                sizes = pictures or [len(row) // size for row in records.tokens]
                if not sizes:
                    continue
                lengths = np.array(sizes, dtype=np.int64)
                counts.records += lengths.size
                counts.tokens += int(lengths.sum())
                proteins = proteins or any(row.translate(None, NUCLEOTIDE_IDS) for row in records.tokens)
                by_length.update(count_lengths(lengths))
                shortest, longest = min([shortest, *sizes]), max([longest, *sizes])
                headers = records.headers or [b""] * len(records.tokens)
                shown = zip(records.identifiers, records.tokens, headers, strict=True)
                counts.first += (_raw_line(read, *each) for each in islice(shown, show - len(counts.first)))
        if counts.records == before and leaf.format != "fasta":
            raise nothing_in(leaf)
    counts.unknown = encoder.unknown if isinstance(encoder, Encoder) else Counter()
    counts.lengths = describe_lengths(dict(by_length), shortest, longest)
    suspect = NUCLEOTIDES_SENTENCE if counts.tokens >= PEPTIDE and not proteins else None
    counts.warnings = [each for each in (suspect, read.mistaken(leaves)) if each]
    return counts


def raw_lines(read: Reading, counts: RawCounts) -> Iterator[str]:
    """The counts as text."""
    unit = {"bytes": "bytes of text", **UNITS}.get(read.tokens, "tokens")
    yield f"{counts.files} file{'s' * (counts.files > 1)}: {counts.records:,} records, {counts.tokens:,} {unit}"
    yield from (f"  warning    {warning}" for warning in counts.warnings)
    yield from _unknown_lines(dict(counts.unknown), ALPHABETS.get(read.tokens, PROTEINS).other)
    yield from length_lines(counts.lengths, counts.tokens, counts.records)
    yield from counts.first


def _raw_line(read: Reading, identifier: bytes, tokens: bytes, header: bytes) -> str:
    taxon = ""
    if header and read.tokens == "protein":
        found = parse_header(header.decode())
        members = f"{found.members:,} member{'s' * (found.members != 1)}" if found.members is not None else ""
        known = ", ".join(filter(None, (found.taxon, members)))
        taxon = f"TaxID {'unknown' if found.taxid is None else found.taxid}{f' ({known})' if known else ''}"
    row = np.frombuffer(tokens, stored_dtype(read.vocabulary))
    return _line(identifier.decode("utf-8", "surrogateescape"), taxon, row, read.vocabulary)


def _line(identifier: str, taxon: str, tokens: Tokens, vocabulary: Vocabulary) -> str:
    """A record's name, taxon, length and beginning."""
    start, name = tokens[: 4 * SHOWN], vocabulary.name
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
    return "  ".join(
        ("", in_line(identifier), *([taxon] if taxon else []), f"{len(tokens):,}", f"{shown[:SHOWN]}{more}")
    )


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
    report: Mapping[str, Any] = manifest.report
    unit = {"bytes": "bytes of text", **UNITS}.get(manifest.vocabulary.name, "tokens")
    split_by = str(manifest.settings.get("split_by", "id"))
    files = len(manifest.sources)
    records = sum(split.records for split in manifest.splits.values())
    tokens = sum(split.tokens for split in manifest.splits.values())
    yield f"{name}: {records:,} records, {tokens:,} {unit}, fingerprint {manifest.fingerprint[:16]}"
    yield f"  read       {report['records']:,} records, {report['tokens']:,} {unit}, {files} file{'s' * (files > 1)}"
    if report.get("nucleotides"):
        yield f"  warning    {NUCLEOTIDES_SENTENCE}"
    dropped = {"duplicates": report["duplicates"], **report["filtered"]}
    for reason, number in dropped.items():
        if number:
            yield f"  dropped    {number:,} {reason}"
    alphabet = ALPHABETS.get(manifest.vocabulary.name, PROTEINS)
    yield from _unknown_lines(report["unknown_letters"], alphabet.other)
    if repeated := report.get("repeated_ids"):
        how = {"id": "equal ones are in one split", "cluster": "clusters decide the splits"}
        yield (
            f"  note       {repeated['again']:,} of {repeated['records']:,} records have an id that others have "
            f"({in_line(repeated['first'])[:40]}): {how.get(split_by, 'a hash of the sequences decides the splits')}"
        )
    if clusters := report.get("clusters"):
        yield f"  clusters   {', '.join(_cluster_words(clusters))}"
    if report["held_out_families"]:
        yield f"  held out   families {', '.join(report['held_out_families'])}"
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
        alone = f"; {clusters['alone']:,} records are not in it" if "alone" in clusters else ""
        yield f"{clusters['rows']:,} rows of the table{alone}"
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
