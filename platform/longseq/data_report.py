"""A look at the data before anything is made: records, letters read as X, splits that would be empty."""

from __future__ import annotations

import sys
from pathlib import Path

from longseq.clusters import members_of
from longseq.config.schema import Config
from longseq.data import SPLITS, Where, cache_folder, read_while_training, reading, sources_of
from longseq.label_data import check_table
from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.ingest.survey import UNITS, Report, survey
from longseq_data.readers.fasta import NUCLEOTIDES_SENTENCE
from longseq_data.samples.members import Members
from longseq_data.splits import SplitRule


def check_data(config: Config, begun: bool = False) -> None:
    """Look at the beginning of every file before anything is made, and say what letters are read as X.

    begun: their blocks are being made (data.begin_reading), and parsed nowhere else.

    Raises:
        DataError: for a file that cannot be trained on.
    """
    if config.finetune.table:
        check_table(config)
        return
    for split in SPLITS:
        for where in sources_of(config, split):
            name = f"data.{split}" + (f" ({where.name})" if where.name else "")
            if where.corpus:
                _say_corpus(name, where.corpus, split)
                if config.data.clusters and (split == "train" or config.data.packing == "family"):
                    _say_clusters(config, name, where.corpus, split)
            elif where.own and where.paths:
                _check_files(config, name, where, split, begun and split in read_while_training(config))


def _say_corpus(name: str, path: str, split: str) -> None:
    corpus = Corpus.open(path, split)
    unit = UNITS.get(corpus.vocabulary.name, "tokens")
    print(f"{name}: {len(corpus):,} records, {corpus.tokens:,} {unit} of {path}", file=sys.stderr)
    if read_manifest(Path(path)).report.get("nucleotides"):
        print(f"longseq: warning: {name}: {NUCLEOTIDES_SENTENCE}", file=sys.stderr)


def _say_clusters(config: Config, name: str, path: str, split: str) -> None:
    index = members_of(config, path, split, cache_folder(config.data.cache))
    clusters, records = Members(index).count, len(Corpus.open(path, split))
    one = f"up to {config.data.length:,} tokens" if config.data.packing == "family" else "one record"
    print(f"{name}: an epoch is {one} of each of {clusters:,} clusters", file=sys.stderr)
    if clusters == records:
        print(
            f"longseq: warning: {name}: by data.clusters={config.data.clusters} no two of the {records:,} records are "
            "of one cluster. Is it the table of this corpus, with its identifiers?",
            file=sys.stderr,
        )


def _check_files(config: Config, name: str, where: Where, split: str, begun: bool) -> None:
    data, read = config.data, reading(config)
    # Shares are held out of the training files alone, and only where no files were named for that split.
    shares = split == "train"
    report = survey(
        read,
        where.paths,
        strict=data.strict,
        rule=SplitRule(
            data.valid_fraction if shares and not data.valid else 0.0,
            data.test_fraction if shares and not data.test else 0.0,
            data.split_by if read.has_residues else "id",
        ),
        cache=cache_folder(data.cache) if begun else None,
    )
    if shares and report.complete:
        _refuse_empty_splits(config, name, report)
    found = report.identifiers
    if shares and found.again and found.by == "sequence":
        print(
            f"longseq: note: {name}: {found.again:,} of {report.records:,} records have an identifier that "
            f"came before (the first: '{found.first_again[:40]}'): a hash of the sequences decides the splits.",
            file=sys.stderr,
        )
    elif shares and found.repeated:
        print(
            f"longseq: warning: {name}: {report.records:,} records have {len(report.identifiers.places):,} "
            "different identifiers, which decide their splits: the splits may be uneven, or empty.",
            file=sys.stderr,
        )
    say(name, report)


def say(name: str, report: Report) -> None:
    """What a look at some data found, and which letters were read as X, on stderr."""
    extent = "" if report.complete else " at the beginning of the files"
    print(f"{name}: {report.records:,} records, {report.residues:,} {report.unit}{extent}", file=sys.stderr)
    if report.warning:
        print(f"longseq: warning: {name}: {report.warning}", file=sys.stderr)
    if report.unknown:
        letters = ", ".join(f"{letter!r} × {count:,}" for letter, count in report.unknown.most_common(5))
        first = f"; the first in {report.notes[0].partition(' is read as')[0]}" if report.notes else ""
        print(
            f"longseq: warning: letters outside the alphabet are read as {report.other}: {letters}{first}. "
            "Refuse them with data.strict=true.",
            file=sys.stderr,
        )


def _refuse_empty_splits(config: Config, name: str, report: Report) -> None:
    """A split that turns out empty at the first validation would cost the steps before it."""
    data, found = config.data, report.identifiers
    shares = 0.0 if data.valid else data.valid_fraction, 0.0 if data.test else data.test_fraction
    validates = bool(config.trainer.valid_every) and not data.valid
    if not found.splits["train"]:
        raise DataError(f"{name}: {found.lost('train', *shares, otherwise='name files in data.valid and data.test')}.")
    if validates and not found.splits["valid"]:
        otherwise = "name files in data.valid, or validate never (trainer.valid_every=0)"
        raise DataError(f"{name}: {found.lost('valid', *shares, otherwise=otherwise)}.")
    if shares[1] and not found.splits["test"]:
        otherwise = "name files in data.test, when training or later with `longseq evaluate RUN data.test=FILE`"
        print(f"longseq: note: {name}: {found.lost('test', *shares, otherwise=otherwise)}.", file=sys.stderr)
