"""Whole clusters of similar sequences held out, and nothing in train that is similar to them.

MMseqs2 clusters all records, and a hash of its representative puts each cluster into a split. That alone leaves
relatives on both sides: members of two clusters may be as similar as members of one. So the held-out records are
searched among those of train, and every cluster with a hit goes to train as a whole; then the rest is searched among
those that went there, until nothing is found. What is held out at the end has no relative in train by that search.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from longseq_data.splits import SplitRule, fractions
from longseq_data.vocabulary import TO_LETTERS

from .held_out import Words, hashes
from .map_stage import OOD, numbers
from .mmseqs import MMseqs
from .reduce_stage import ReduceTask, all_rows

SOME = 1 << 16  # records at a time
# A search rounds shares and depends a little on the size of what is searched, so this one looks beyond the limits.
MARGIN = 0.005
EVALUE = 0.1  # a hundred times what a search takes for a relative

HELD = np.dtype([("key", "<u8"), ("split", "u1"), ("cluster", "<u8")])


@dataclass(frozen=True)
class ClusterReport:
    """What became of the clusters."""

    program: str  # and its version, which the splits depend on
    clusters: int
    moved: int  # records that went to train, since they have relatives there
    searches: int


def split_clusters(
    task: ReduceTask,
    rule: SplitRule,
    identity: float,
    coverage: float,
    program: tuple[str, int, int],
    progress: Callable[[int], object],
    path: Path,
) -> dict[str, object]:
    """Write the held-out records to ``path``, .npy of HELD sorted by key, and say what was found.

    program: path, threads and MiB of MMseqs2. progress: called with the number of finished steps.
    Raises DataError where MMseqs2 fails.
    """
    folder = Path(tempfile.mkdtemp(prefix="mmseqs-", dir=path.parent))
    try:
        tool = MMseqs(program[0], folder, *program[1:])
        records, queries, targets = (folder / f"{name}.fasta" for name in ("records", "queries", "targets"))
        with records.open("wb") as handle:
            for key, tokens in _sequences(task):
                handle.write(b">%016x\n%s\n" % (key, tokens.translate(TO_LETTERS)))
        progress(1)
        held, clusters = _held_out(tool.cluster(records, identity, coverage), rule)
        progress(2)
        first, searches, others = held["key"], 0, partial(_outside, held["key"])
        while held.size:
            _choose(records, queries, partial(_among, held["key"]))
            if not _choose(records, targets, others):
                break  # all are held out
            hits = tool.search(queries, targets, identity - MARGIN, coverage - MARGIN, EVALUE)
            found = np.unique(np.fromiter((int(hit.query, 16) for hit in hits), dtype=np.uint64))
            searches += 1
            progress(2 + searches)
            moved = np.isin(held["cluster"], held["cluster"][_among(found, held["key"])])
            others, held = partial(_among, held["key"][moved]), held[~moved]
            if not moved.any():
                break
        np.save(path, held)
        report = ClusterReport(f"mmseqs {tool.version()}", clusters, int(first.size - held.size), searches)
        return asdict(report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def splits_of(path: Path, keys: Words, split: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The splits of records by their keys: those of the held-out clusters; OOD stays."""
    held = np.load(path, mmap_mode="r")
    there = _among(held["key"], keys) & (split != OOD)
    split = split.copy()
    split[there] = held["split"][np.searchsorted(held["key"], keys[there])]
    return split


def _among(listed: Words, keys: Words) -> npt.NDArray[np.bool_]:
    """Which of the keys are listed, in ascending order."""
    if not listed.size:
        return np.zeros(len(keys), dtype=bool)
    return listed[np.minimum(np.searchsorted(listed, keys), listed.size - 1)] == keys


def _outside(listed: Words, keys: Words) -> npt.NDArray[np.bool_]:
    return ~_among(listed, keys)


def _sequences(task: ReduceTask) -> Iterator[tuple[int, bytes]]:
    """(key, tokens) of every different record but those of the ood split, in the order of the corpus."""
    last = None
    for rows in all_rows(task):
        for row in rows.order.tolist():
            key = int(rows.digests[row, 0])
            if rows.split[row] != OOD and key != last:
                yield key, rows.columns["tokens"][row].as_py()
                last = key


def _held_out(pairs: Iterable[tuple[str, str]], rule: SplitRule) -> tuple[npt.NDArray[Any], int]:
    """(the members of held-out clusters, of HELD, sorted; how many clusters there are)."""
    parts, clusters = [np.empty(0, HELD)], 0
    pairs = iter(pairs)
    while some := list(islice(pairs, SOME)):
        clusters += sum(representative == member for representative, member in some)
        names = hashes(representative for representative, _ in some)
        split = numbers(rule, fractions(names))
        keys = np.array([int(member, 16) for _, member in some], dtype=np.uint64)
        parts.append(np.rec.fromarrays([keys, split, names], dtype=HELD)[split > 0])
    return np.sort(np.concatenate(parts), order="key"), clusters


def _choose(records: Path, path: Path, wanted: Callable[[Words], npt.NDArray[np.bool_]]) -> int:
    """Copy the records whose keys are wanted, each of two lines; how many they are."""
    count = 0
    with records.open("rb") as source, path.open("wb") as copy:
        while some := list(islice(_pairs_of_lines(source), SOME)):
            keys = np.array([int(header[1:], 16) for header, _ in some], dtype=np.uint64)
            for yes, (header, letters) in zip(wanted(keys).tolist(), some, strict=True):
                if yes:
                    copy.write(header + letters)
                    count += 1
    return count


def _pairs_of_lines(source: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    while header := source.readline():
        yield header, source.readline()
