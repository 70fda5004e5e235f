"""Check a prepared corpus against its manifest: every file, and what is in them."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import MANIFEST, DataFile, Manifest, fingerprint, read_manifest
from longseq_data.errors import DataError
from longseq_data.files import sha256_of, user_path
from longseq_data.os_errors import explained
from longseq_data.randomness import generator
from longseq_data.splits import SplitRule

from .map_stage import digest
from .reduce_stage import CELL_BITS, WORD, RowDigest, split_digest

CELLS = 1 << CELL_BITS
SAMPLE = 4  # cells whose rows are compared, unless all are, as in a corpus of at most
SMALL = 100_000  # records
NAMED = 4  # problems in a sentence

Progress = Callable[[str, int, int], object]  # (stage, done, of how many): bytes, then cells of hashes


@dataclass(frozen=True)
class Verified:
    fingerprint: str
    files: int
    bytes: int
    records: int
    compared: int  # records whose sequences were compared with all others


def verify(path: str | Path, *, full: bool = False, progress: Progress | None = None) -> Verified:
    """Read a corpus again and compare it with its manifest.

    Always: size and SHA-256 of every file, rows, ranges of tokens, offsets, and the fingerprint of the manifest. Of
    SAMPLE in CELLS parts of the records: that they are in their places, each in the split of its hash unless clusters
    decided it, and where duplicates were dropped that no sequence comes twice in all splits. With ``full``, and of a
    small corpus, this of all records, and that ids, tokens and TaxIDs are those of the fingerprint.

    Raises DataError, one sentence that names what is damaged.
    """
    folder = user_path(path).absolute()
    manifest = read_manifest(folder)
    said = progress or (lambda *_: None)
    problems = list(_manifest_problems(folder, manifest))
    files = [*manifest.files, *(file for split in manifest.splits.values() for file in split.files)]
    total, done = sum(file.size for file in files), 0
    for file in files:
        said("bytes", done, total)
        problems += _file_problems(folder, file)
        done += file.size
    said("bytes", total, total)
    compared = 0
    if not problems:  # what is damaged cannot be compared, and need not be
        corpora = {name: Corpus.open(folder, name) for name in manifest.splits}
        for corpus in corpora.values():
            problems += _token_problems(corpus)
        cells = range(CELLS)
        if not full and sum(map(len, corpora.values())) > SMALL:
            drawn = generator(int(manifest.fingerprint[:8], 16), "cells").random(CELLS)
            cells = np.argsort(drawn, kind="stable")[:SAMPLE].tolist()
        digests: dict[str, dict[int, str]] = {name: {} for name in corpora}
        for number, cell in enumerate(cells):
            said("cells", number, len(cells))
            rows = _Cell(manifest, corpora, cell)
            problems += rows.problems()
            compared += rows.records
            for name, row_digest in rows.digests.items():
                digests[name][cell] = row_digest
        said("cells", len(cells), len(cells))
        for name in corpora if len(cells) == CELLS and not problems else ():
            if split_digest(digests[name]) != manifest.splits[name].digest:
                problems.append(f"the rows of {name} are not those of the fingerprint")
    if problems:
        more = f", and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DataError(
            f"{folder} is damaged: {', '.join(problems[:NAMED])}{more}; restore it, or prepare the corpus again with "
            f"--overwrite."
        )
    records = sum(split.records for split in manifest.splits.values())
    return Verified(manifest.fingerprint, len(files), total, records, compared)


def _manifest_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    if fingerprint(manifest.vocabulary, manifest.splits) != manifest.fingerprint:
        yield f"the fingerprint in {MANIFEST} is not that of what it describes"
    for name, split in manifest.splits.items():
        if sum(file.rows or 0 for file in split.files) != split.records:
            yield f"{MANIFEST} gives {name} {split.records:,} records, its files have others"


def _file_problems(folder: Path, file: DataFile) -> Iterator[str]:
    try:
        size = (folder / file.name).stat().st_size
        if size != file.size:
            yield f"{file.name} has {size:,} bytes, not {file.size:,}"
        elif sha256_of(folder / file.name) != file.sha256:
            yield f"{file.name} has another SHA-256"
        elif file.name.endswith(".json"):
            json.loads((folder / file.name).read_text())
    except FileNotFoundError:
        yield f"{file.name} is missing"
    except OSError as error:
        yield explained(error, file.name, "cannot be read")
    except ValueError as error:
        yield f"{file.name} cannot be read ({error})"


def _token_problems(corpus: Corpus) -> Iterator[str]:
    """Of what every batch must be: Corpus.open has compared rows, tokens and offsets of the batches' borders."""
    for number, (first, offsets, values) in enumerate(corpus.batches()):
        if not values.size or int(values.max()) >= corpus.vocabulary.ordinary:
            yield f"batch {number} of {corpus.split} has tokens outside the vocabulary"
        there = corpus.offsets[first : first + offsets.size]
        if not np.array_equal(offsets - offsets[0], there - there[0]):
            yield f"the offsets of batch {number} of {corpus.split} are not those of its records"


class _Cell:
    """The rows of all splits whose hashes begin with the same bits."""

    def __init__(self, manifest: Manifest, corpora: dict[str, Corpus], cell: int) -> None:
        self.records = 0
        self.digests: dict[str, str] = {}
        self._problems: list[str] = []
        valid, test = (manifest.settings[f"{name}_fraction"] for name in ("valid", "test"))
        by = str(manifest.settings.get("split_by", "id"))
        rule = None if by == "cluster" else SplitRule(float(valid), float(test), by)  # type: ignore[arg-type]
        deduplicate = manifest.settings["deduplicate"]
        seen: dict[bytes, str] = {}
        for name, corpus in corpora.items():
            start, stop = (_first_row(corpus, border << (WORD - CELL_BITS)) for border in (cell, cell + 1))
            last = b""
            hashes, lengths, identifiers, taxids = [], [], [], []
            for index, row in enumerate(corpus.rows(start, stop), start):
                this = digest(row.tokens.tobytes())
                where = f"record {index} of {name}"
                if this < last:
                    self._problems.append(f"{where} is not in its place")
                elif deduplicate and this in seen:
                    self._problems.append(f"{where} is in {seen[this]} too")
                if name != "ood" and rule is not None and rule.split(row.identifier, row.tokens.tobytes()) != name:
                    self._problems.append(f"{where} belongs to another split by its {rule.by}")
                seen[this] = name
                last = this
                hashes.append(this)
                identifiers.append(row.identifier.encode())
                lengths.append(len(identifiers[-1]))
                taxids.append(row.taxid)
            if hashes:
                row_digest = RowDigest()
                words = np.frombuffer(b"".join(hashes), dtype=">u8").reshape(-1, 2)
                row_digest.update(words, np.array(lengths), b"".join(identifiers), np.array(taxids))
                self.digests[name] = row_digest.hexdigest()
            self.records += stop - start

    def problems(self) -> list[str]:
        return self._problems


def _first_row(corpus: Corpus, key: int) -> int:
    """The first row whose key is ``key`` or more: rows stand in the order of their keys."""

    def key_of(row: int) -> int:
        return int.from_bytes(digest(corpus.record(row).tokens.tobytes())[:8], "big")

    return bisect_left(range(len(corpus)), key, key=key_of)
