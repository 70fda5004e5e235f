"""Relatives of held-out records among those of train: how much of a test a model may have seen."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.vocabulary import TO_LETTERS

from .mmseqs import MMseqs, program

SOME = 1 << 14  # records at a time

Progress = Callable[[str, int, int], object]  # (stage, done, of how many): searches


@dataclass(frozen=True)
class Leaks:
    """What a search of one split among train has found."""

    split: str
    records: int
    related: dict[str, int]  # identity in percent -> records with a relative at least so identical
    nearest: tuple[str, str, float] | None  # (record, relative in train, identity) of the most identical pair


def find_leaks(
    path: str | Path,
    *,
    splits: Sequence[str] = ("test", "valid"),
    identities: Sequence[int] = (30, 50, 90),
    coverage: float = 0.8,
    threads: int = 1,
    memory_mb: int = 2048,
    progress: Progress | None = None,
) -> list[Leaks]:
    """Search those of ``splits`` that a corpus has among its train, with MMseqs2.

    identities: percent of the aligned residues that are the same. coverage: share of a held-out record that must be
    aligned. threads, memory_mb: of MMseqs2.

    Raises DataError for a corpus that is none of proteins or has neither split, and without MMseqs2.
    """
    folder = user_path(path).absolute()
    manifest = read_manifest(folder)
    if manifest.vocabulary.name != "protein":
        raise DataError(f"{folder} holds {manifest.vocabulary.name} tokens, and MMseqs2 compares proteins here.")
    asked = [name for name in splits if name in manifest.splits]
    if not asked or "train" not in manifest.splits:
        there = ", ".join(manifest.splits)
        raise DataError(f"{folder} has {there}; a search needs train, and one of {', '.join(splits)}.")
    tool_path, found, train = program(), [], Corpus.open(folder, "train")
    said = progress or (lambda *_: None)
    scratch = Path(tempfile.mkdtemp(prefix="longseq-leaks-"))
    try:
        tool = MMseqs(tool_path, scratch, threads, memory_mb)
        targets = _write(train, scratch / "train.fasta")
        for number, name in enumerate(asked):
            said("searches", number, len(asked))
            corpus = Corpus.open(folder, name)
            queries = _write(corpus, scratch / f"{name}.fasta")
            best, relative = np.zeros(len(corpus)), np.zeros(len(corpus), dtype=np.int64)
            for hit in tool.search(queries, targets, min(identities) / 100, coverage):
                if hit.identity > best[int(hit.query)]:
                    best[int(hit.query)], relative[int(hit.query)] = hit.identity, int(hit.target)
            related = {str(percent): int((best >= percent / 100).sum()) for percent in sorted(identities)}
            most = int(best.argmax())
            nearest = (
                (corpus.record(most).identifier, train.record(int(relative[most])).identifier, float(best[most]))
                if best[most]
                else None
            )
            found.append(Leaks(name, len(corpus), related, nearest))
        said("searches", len(asked), len(asked))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _write(corpus: Corpus, path: Path) -> Path:
    """The records as FASTA, named by their numbers."""
    with path.open("wb") as handle:
        for first in range(0, len(corpus), SOME):
            for number, row in enumerate(corpus.rows(first, min(first + SOME, len(corpus))), first):
                handle.write(b">%d\n%s\n" % (number, row.tokens.tobytes().translate(TO_LETTERS)))
    return path
