"""The first half of a preparation: rows are filtered, hashed, sorted by hash, and put aside in one file a block.

The hash is that of the tokens. Its order is the order of the finished corpus: pseudo-random, the same whatever the
order in which records came, and equal sequences are neighbours in it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longseq_data.files import aside
from longseq_data.readers.fasta import NUCLEOTIDES
from longseq_data.splits import Floats, SplitRule, fractions
from longseq_data.vocabulary import TABLE, X

from .cluster_table import ClusterTable
from .config import PrepareConfig
from .held_out import HeldOut, Words, accession, hashes
from .reader import Block, ProteinReader, Row, Stored, checksum

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "valid", "test", "ood")
OOD = SPLITS.index("ood")
NUCLEOTIDE_IDS = NUCLEOTIDES.translate(TABLE) + bytes([X])  # and X, which gaps are read as


@dataclass
class Counts:
    """What was read, and what became of it. Counts of two parts of the input add up."""

    records: int = 0
    tokens: int = 0
    kept: int = 0  # records that passed the filters
    kept_bytes: int = 0  # of their tokens and ids
    filtered: Counter[str] = field(default_factory=Counter)  # reason -> records
    unknown: Counter[str] = field(default_factory=Counter)  # letter -> times read as X
    held_out: Counter[str] = field(default_factory=Counter)  # "list" or "taxid" -> records, duplicates too
    proteins: bool = False  # whether any record has a letter that nucleotides do not have

    def add(self, other: Counts) -> None:
        self.records += other.records
        self.tokens += other.tokens
        self.kept += other.kept
        self.kept_bytes += other.kept_bytes
        self.filtered += other.filtered
        self.unknown += other.unknown
        self.held_out += other.held_out
        self.proteins = self.proteins or other.proteins


@dataclass(frozen=True)
class MapTask:
    """What a worker needs to know beside the text."""

    folder: Path  # for the files put aside
    config: PrepareConfig
    names: Path | None  # .npy of HeldOut.names
    block_bytes: int
    clusters: ClusterTable | None = None  # that a TSV lists

    def reader(self) -> ProteinReader:
        config = self.config
        by_repid = config.split_by == "cluster" and config.clusters == "repid"
        return ProteinReader(refuse=config.unknown == "refuse", repids=by_repid)

    def held_out(self) -> HeldOut:
        return HeldOut(np.load(self.names, mmap_mode="r") if self.names else np.empty(0, dtype=np.uint64))

    def path(self, source: int, number: int) -> Path:
        return self.folder / f"{source:05d}-{number:06d}.arrow"


def map_block(task: MapTask, source: int, block: Block) -> None:
    """Put the rows of a block aside. Raises DataError for bad records, OSError where the disk is full."""
    reader = task.reader()
    store(task, task.path(source, block.number), reader.block(block), reader.unknown, block.checksum)


def map_whole(task: MapTask, source: int, name: str) -> Stored:
    """Put the rows of a source aside that is not cut into blocks; gives its size and checksum."""
    reader = task.reader()
    rows = reader.whole(name)
    number = 0
    while some := list(_first(rows, task.block_bytes)):
        store(task, task.path(source, number), some, reader.unknown, 0)
        reader.unknown.clear()
        number += 1
    stored = checksum(name)
    stored.blocks = number
    return stored


def _first(rows: Iterator[Row], size: int) -> Iterator[Row]:
    """Rows until they hold ``size`` bytes."""
    for row in rows:
        yield row
        size -= len(row.tokens) + len(row.identifier)
        if size <= 0:
            return


def store(task: MapTask, path: Path, rows: Iterable[Row], unknown: Counter[str], check: int) -> None:
    """Write the rows that pass the filters, sorted by hash, without duplicates; under the final name when on disk."""
    import pyarrow as pa

    config, counts = task.config, Counts()
    names: list[str] = []
    tokens: list[bytes] = []
    taxids: list[int] = []
    clusters: list[str] = []
    keep = _filter(config)
    for row in rows:
        counts.records += 1
        counts.tokens += len(row.tokens)
        counts.proteins = counts.proteins or bool(row.tokens.translate(None, NUCLEOTIDE_IDS))
        reason = keep(row)
        if reason is None:
            names.append(row.identifier)
            tokens.append(row.tokens)
            taxids.append(row.taxid)
            clusters.append(row.cluster or accession(row.identifier))
        else:
            counts.filtered[reason] += 1
    identifiers = [name.encode() for name in names]
    counts.kept = len(names)
    counts.kept_bytes = sum(map(len, tokens)) + sum(map(len, identifiers))
    counts.unknown = unknown
    taxid = np.array(taxids, dtype=np.int64)
    digests = np.frombuffer(b"".join(map(digest, tokens)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    split = numbers(config.rule, _places(task, names, clusters, digests))
    listed = task.held_out().holds(names)
    by_taxid = np.isin(taxid, np.array(config.ood_taxids, dtype=np.int64))
    split[listed | by_taxid] = OOD
    counts.held_out = +Counter({"list": int(listed.sum()), "taxid": int(by_taxid.sum())})
    order, split = ordered(digests, split, identifiers.__getitem__, taxid, config.deduplicate)
    batch = pa.record_batch(
        {
            "key": pa.array(digests[order, 0]),
            "rest": pa.array(digests[order, 1]),
            "split": pa.array(split[order]),
            "taxid": pa.array(taxid[order]),
            "id": pa.array(identifiers, pa.large_binary()).take(pa.array(order)),
            "tokens": pa.array(tokens, pa.large_binary()).take(pa.array(order)),
        }
    )
    _write(path, batch, {"counts": vars(counts), "checksum": check})


def digest(tokens: bytes) -> bytes:
    """The 128-bit hash that stands for a sequence: equal hashes are taken for equal sequences."""
    return hashlib.blake2b(tokens, digest_size=16).digest()


def _filter(config: PrepareConfig) -> Callable[[Row], str | None]:
    """The reason for which a row is left out, or None."""
    low, high = config.min_length, config.max_length or 1 << 62
    include, exclude = frozenset(config.include_taxids), frozenset(config.exclude_taxids)
    share = config.max_unknown if config.unknown == "drop" else None

    def reason(row: Row) -> str | None:
        length = len(row.tokens)
        if length < low:
            return "too short"
        if length > high:
            return "too long"
        if row.taxid in exclude:
            return "TaxID excluded"
        if include and row.taxid not in include:
            return "TaxID not included"
        if share is not None and row.tokens.count(X) > share * length:
            return "too many unknown letters"
        return None

    return reason


def _places(task: MapTask, names: list[str], clusters: list[str], digests: Words) -> Floats:
    """Where the records stand in [0, 1), by what decides their splits; see splits.SplitRule.

    clusters: RepIDs, or else accessions. With clusters of MMseqs2 all are in train until those are known.
    """
    config = task.config
    if config.split_by != "cluster":
        return fractions(hashes(names) if config.rule.by == "id" else digests[:, 1])
    if config.clusters == "mmseqs":
        return np.ones(len(names))
    return fractions(hashes(clusters) if task.clusters is None else task.clusters.of(names))


def numbers(rule: SplitRule, places: Floats) -> npt.NDArray[np.uint8]:
    """An index of SPLITS for each place."""
    valid, test = rule.chosen("valid", places), rule.chosen("test", places)
    return np.where(valid, 1, np.where(test, 2, 0)).astype(np.uint8)


def ordered(
    digests: npt.NDArray[np.uint64],
    split: npt.NDArray[np.uint8],
    identifier: Callable[[int], bytes],
    taxid: npt.NDArray[np.int64],
    deduplicate: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """(rows to keep, in the order of the corpus; splits of all rows).

    Of rows with equal digests (n, 2), the one with the smallest (id, TaxID) is kept, and held out (OOD) if any of them
    is. Without ``deduplicate`` all are kept, in that order.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    if not order.size:
        return order, split
    inner = digests[order]
    starts = np.flatnonzero(np.concatenate([[True], (inner[1:] != inner[:-1]).any(axis=1)]))
    if starts.size == order.size:
        return order, split
    split = split.copy()
    sizes = np.diff(np.append(starts, order.size))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        group = sorted(order[start : start + size].tolist(), key=lambda row: (identifier(row), taxid[row], split[row]))
        order[start : start + size] = group
        if deduplicate and (split[group] == OOD).any():
            split[group[0]] = OOD
    return (order[starts] if deduplicate else order), split


def _write(path: Path, batch: pa.RecordBatch, notes: dict[str, Any]) -> None:
    import pyarrow as pa

    batch = batch.replace_schema_metadata({"notes": json.dumps(notes)})
    with aside(path) as partial, partial.open("wb") as handle, pa.ipc.new_file(handle, batch.schema) as writer:
        writer.write_batch(batch)


def read_notes(path: Path) -> tuple[Counts, int, int]:
    """(counts, checksum of the text, rows) of a file put aside."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as handle, pa.ipc.open_file(handle) as file:
        notes = json.loads(file.schema.metadata[b"notes"])
        rows = file.get_batch(0).num_rows
    counts = notes["counts"]
    for name in ("filtered", "unknown", "held_out"):
        counts[name] = Counter(counts[name])
    return Counts(**counts), notes["checksum"], rows
