"""A look at the data before anything is made: records, letters read as X, splits that would be empty."""

from __future__ import annotations

import sys
from pathlib import Path

from longseq.config import Config
from longseq.data import SPLITS, corpus_of, reading
from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.readers.fasta import NUCLEOTIDES_SENTENCE, ScanReport
from longseq_data.readers.survey import UNITS, survey
from longseq_data.splits import SplitRule


def check_data(config: Config) -> None:
    """Read the beginning of every file before anything is made, and say what letters were read as X.

    Raises:
        DataError: for a file that cannot be trained on.
    """
    read = reading(config)
    for split in SPLITS:
        sources = getattr(config.data, split)
        prepared = corpus_of(config, split)
        if prepared:
            corpus = Corpus.open(prepared, split)
            unit = UNITS.get(corpus.vocabulary.name, "tokens")
            print(f"data.{split}: {len(corpus):,} records, {corpus.tokens:,} {unit} of {prepared}", file=sys.stderr)
            if read_manifest(Path(prepared)).report.get("nucleotides"):
                print(f"longseq: warning: data.{split}: {NUCLEOTIDES_SENTENCE}", file=sys.stderr)
            continue
        if not sources:
            continue
        data = config.data
        # Shares are held out of the training files alone, and only where no files were named for that split.
        shares = split == "train"
        report = survey(
            read,
            sources,
            strict=data.strict,
            rule=SplitRule(
                data.valid_fraction if shares and not data.valid else 0.0,
                data.test_fraction if shares and not data.test else 0.0,
                data.split_by if read.has_residues else "id",
            ),
        )
        if shares and report.complete:
            _refuse_empty_splits(config, report)
        found = report.identifiers
        if shares and found.again and found.by == "sequence":
            print(
                f"longseq: note: data.train: {found.again:,} of {report.records:,} records have an identifier that "
                f"came before (the first: '{found.first_again[:40]}'): a hash of the sequences decides the splits.",
                file=sys.stderr,
            )
        elif shares and found.repeated:
            print(
                f"longseq: warning: data.train: {report.records:,} records have {len(report.identifiers.places):,} "
                "different identifiers, which decide their splits: the splits may be uneven, or empty.",
                file=sys.stderr,
            )
        say(f"data.{split}", report)


def say(name: str, report: ScanReport) -> None:
    """What a look at some data found, and which letters were read as X, on stderr."""
    extent = "" if report.complete else " at the beginning of the files"
    print(f"{name}: {report.records:,} records, {report.residues:,} {report.unit}{extent}", file=sys.stderr)
    if report.warning:
        print(f"longseq: warning: {name}: {report.warning}", file=sys.stderr)
    if report.unknown:
        letters = ", ".join(f"{letter!r} × {count:,}" for letter, count in report.unknown.most_common(5))
        first = report.first_unknown
        place = f", first at {first[0]}:{first[1]}" if first else ""
        print(
            f"longseq: warning: letters outside the alphabet are read as {report.other}: {letters}{place}. "
            "Refuse them with data.strict=true.",
            file=sys.stderr,
        )


def _refuse_empty_splits(config: Config, report: ScanReport) -> None:
    """A split that turns out empty at the first validation would cost the steps before it."""
    data, found = config.data, report.identifiers
    shares = 0.0 if data.valid else data.valid_fraction, 0.0 if data.test else data.test_fraction
    validates = bool(config.trainer.valid_every) and not data.valid
    if not found.splits["train"]:
        raise DataError(
            f"data.train: {found.lost('train', *shares, otherwise='name files in data.valid and data.test')}."
        )
    if validates and not found.splits["valid"]:
        otherwise = "name files in data.valid, or validate never (trainer.valid_every=0)"
        raise DataError(f"data.train: {found.lost('valid', *shares, otherwise=otherwise)}.")
    if shares[1] and not found.splits["test"]:
        otherwise = "name files in data.test, when training or later with `longseq evaluate RUN data.test=FILE`"
        print(f"longseq: note: data.train: {found.lost('test', *shares, otherwise=otherwise)}.", file=sys.stderr)
