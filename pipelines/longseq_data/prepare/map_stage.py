"""The first half of a preparation: rows are filtered, hashed, sorted by hash, and put aside in one file a block.

The hash is that of the tokens. Its order is the order of the finished corpus: pseudo-random, the same whatever the
order in which records came, and equal sequences are neighbours in it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq_data.files import aside
from longseq_data.ingest.block import stored_dtype
from longseq_data.ingest.parse import Lot, parse_lot, raw_bytes, read_lots
from longseq_data.readers.fasta import NUCLEOTIDES, Encoder
from longseq_data.readers.fasta_blocks import Piece
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading
from longseq_data.readers.uniprot import parse_header, taxid_of
from longseq_data.splits import Floats, SplitRule, fractions, identifier_places
from longseq_data.vocabulary import ALPHABETS, TABLE, X

from .cluster_table import ClusterTable
from .config import PrepareConfig
from .held_out import HeldOut, Words, accession, hashes
from .identity import checksum

SPLITS = ("train", "valid", "test", "ood")
OOD = SPLITS.index("ood")
NUCLEOTIDE_IDS = NUCLEOTIDES.translate(TABLE) + bytes([X])  # and X, which gaps are read as
NO_TAXID = -1


@dataclass
class Counts:
    """What was read, and what became of it. Counts of two parts of the input add up."""

    records: int = 0
    tokens: int = 0
    kept: int = 0  # records that passed the filters
    kept_bytes: int = 0  # of their tokens, ids and texts
    filtered: Counter[str] = field(default_factory=Counter)  # reason -> records
    unknown: Counter[str] = field(default_factory=Counter)  # letter -> times read as X
    held_out: Counter[str] = field(default_factory=Counter)  # "list" or "taxid" -> records, duplicates too
    alone: int = 0  # records that passed and are not in the table of clusters
    proteins: bool = False  # whether any record has a letter that nucleotides do not have

    def add(self, other: Counts) -> None:
        self.records += other.records
        self.tokens += other.tokens
        self.kept += other.kept
        self.kept_bytes += other.kept_bytes
        self.alone += other.alone
        self.filtered += other.filtered
        self.unknown += other.unknown
        self.held_out += other.held_out
        self.proteins = self.proteins or other.proteins


@dataclass(frozen=True)
class Stored:
    """What a source is made of, known once it has been read to its end."""

    size: int
    sha256: str  # of a folder: what identity_of says; of what does not tell: ""
    blocks: int


@dataclass(frozen=True)
class MapTask:
    """What a worker needs to know besides the sources."""

    folder: Path  # for the files put aside
    config: PrepareConfig
    reading: Reading
    leaves: tuple[Leaf, ...]
    names: Path | None  # .npy of HeldOut.names
    block_bytes: int
    clusters: ClusterTable | None = None  # that a TSV lists

    def path(self, source: int, number: int) -> Path:
        return self.folder / f"{source:05d}-{number:06d}.arrow"

    def text(self, source: int, number: int) -> Path:
        """Where a block waits for the worker that parses it."""
        return self.path(source, number).with_suffix(".pickle")

    def held_out(self) -> HeldOut:
        return HeldOut(np.load(self.names, mmap_mode="r") if self.names else np.empty(0, dtype=np.uint64))


def cut(
    task: MapTask, source: int, advance: Callable[[int], object] | None = None
) -> Generator[list[Lot] | Stored, None, None]:
    """Read a source once, in blocks of about ``block_bytes`` that are not parsed; at last what it is made of.

    advance: gets the bytes that were read, as they are stored. Raises DataError for a source that cannot be read.
    """
    leaf, digest, size, blocks = task.leaves[source], hashlib.sha256(), 0, 0

    def watch(piece: memoryview) -> None:
        nonlocal size
        digest.update(piece)
        size += len(piece)
        if advance is not None:
            advance(len(piece))

    held: list[Lot] = []
    room = task.block_bytes
    with closing(read_lots(task.reading, leaf, strict=task.config.unknown == "refuse", watch=watch)) as lots:
        for lot in lots:
            held.append(lot)
            room -= _size(lot)
            if room <= 0:
                yield held
                held, room, blocks = [], task.block_bytes, blocks + 1
    if held:
        yield held
        blocks += 1
    if size:
        yield Stored(size, digest.hexdigest(), blocks)
        return
    size = Path(leaf.source).stat().st_size if Path(leaf.source).is_file() else 0  # a table, not read front to back
    if advance is not None:
        advance(size)
    yield Stored(size, checksum(leaf.source), blocks)


def _size(lot: Lot) -> int:
    if isinstance(lot, Piece):
        return len(lot.text) + sum(record.length + len(record.description) for record in lot.records)
    return sum(map(raw_bytes, lot))


def map_source(task: MapTask, source: int, advance: Callable[[int], object] | None = None) -> Stored:
    """Put the rows of a source aside. Raises DataError for bad records, OSError where the disk is full."""
    for number, block in enumerate(cut(task, source, advance)):
        if isinstance(block, Stored):
            return block
        map_block(task, source, number, block)
    raise AssertionError("a source without an end")


def map_block(task: MapTask, source: int, number: int, lots: list[Lot] | None = None) -> None:
    """Put the rows of a block aside; without ``lots`` of that which waits on the disk. Raises as ``map_source``."""
    path, text = task.path(source, number), task.text(source, number)
    if not path.exists():
        store(task, path, task.leaves[source], lots if lots is not None else pickle.loads(text.read_bytes()))
    if lots is None:
        text.unlink(missing_ok=True)


def store(task: MapTask, path: Path, leaf: Leaf, lots: list[Lot]) -> None:
    """Write the rows that pass the filters, sorted by hash, without duplicates; under the final name when on disk."""
    import pyarrow as pa

    config, reading, counts = task.config, task.reading, Counts()
    strict = config.unknown == "refuse"
    encoder = reading.encoder(strict)
    width = stored_dtype(reading.vocabulary).itemsize
    keep, proteins = _filter(config, reading), reading.tokens == "protein"
    repids = config.split_by == "cluster" and config.clusters == "repid"
    names: list[bytes] = []
    tokens: list[bytes] = []
    texts: list[bytes] = []
    taxids: list[int] = []
    clusters: list[str] = []
    for lot in lots:
        for records in parse_lot(reading, leaf, lot, encoder, strict=strict):
            count = len(records.tokens)
            headers = [] if records.headers is None or not count else b"\n".join(records.headers).decode().split("\n")
            found = list(map(taxid, headers)) if headers else [NO_TAXID] * count
            reasons = list(map(keep, records.tokens, found))
            kept = [row for row, reason in enumerate(reasons) if reason is None]
            counts.filtered.update(filter(None, reasons))
            counts.records += count
            counts.tokens += sum(map(len, records.tokens)) // width
            if not counts.proteins:
                counts.proteins = not proteins or any(row.translate(None, NUCLEOTIDE_IDS) for row in records.tokens)
            names += _taken(records.identifiers, kept)
            tokens += _taken(records.tokens, kept)
            taxids += _taken(found, kept)
            if records.texts is not None:
                texts += _taken(records.texts, kept)
            if repids:
                clusters += [parse_header(headers[row]).representative or "" for row in kept]
    names = _valid(names)
    counts.kept = len(names)
    counts.kept_bytes = sum(map(len, tokens)) + sum(map(len, names)) + sum(map(len, texts))
    counts.unknown = encoder.unknown if isinstance(encoder, Encoder) else Counter()
    taxids_ = np.array(taxids, dtype=np.int64)
    digests = np.frombuffer(b"".join(map(digest, tokens)), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    split = numbers(config.rule, _places(task, names, clusters, digests, counts))
    listed = task.held_out().holds(names)
    by_taxid = np.isin(taxids_, np.array(config.ood_taxids, dtype=np.int64))
    split[listed | by_taxid] = OOD
    counts.held_out = +Counter({"list": int(listed.sum()), "taxid": int(by_taxid.sum())})
    name = (lambda row: (names[row], texts[row])) if texts else names.__getitem__
    order, split = ordered(digests, split, name, taxids_, config.deduplicate)
    columns = {
        "key": pa.array(digests[order, 0]),
        "rest": pa.array(digests[order, 1]),
        "split": pa.array(split[order]),
        "taxid": pa.array(taxids_[order]),
        "id": pa.array(names, pa.large_binary()).take(pa.array(order)),
        "tokens": pa.array(tokens, pa.large_binary()).take(pa.array(order)),
    }
    if reading.written:
        columns["text"] = pa.array(texts, pa.large_binary()).take(pa.array(order))
    batch = pa.record_batch(columns, metadata={"notes": json.dumps(vars(counts))})
    with aside(path) as partial, partial.open("wb") as handle, pa.ipc.new_file(handle, batch.schema) as writer:
        writer.write_batch(batch)


def read_counts(path: Path) -> Counts:
    """Of a file put aside."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as handle, pa.ipc.open_file(handle) as file:
        counts = json.loads(file.schema.metadata[b"notes"])
    for name in ("filtered", "unknown", "held_out"):
        counts[name] = Counter(counts[name])
    return Counts(**counts)


def taxid(header: str) -> int:
    """The TaxID that ``parse_header`` reads; NO_TAXID without one."""
    found = taxid_of(header)
    return NO_TAXID if found is None else found


def digest(tokens: bytes) -> bytes:
    """The 128-bit hash that stands for a sequence: equal hashes are taken for equal sequences."""
    return hashlib.blake2b(tokens, digest_size=16).digest()


def _taken(items: list[Any], rows: list[int]) -> list[Any]:
    return items if len(rows) == len(items) else [items[row] for row in rows]


def _valid(names: list[bytes]) -> list[bytes]:
    """The names as UTF-8, which those of files need not be."""
    try:
        b"\n".join(names).decode()
    except UnicodeDecodeError:
        return [name.decode(errors="replace").encode() for name in names]
    return names


def _filter(config: PrepareConfig, reading: Reading) -> Callable[[bytes, int], str | None]:
    """The reason for which a row is left out, of its tokens and TaxID, or None."""
    width = stored_dtype(reading.vocabulary).itemsize
    low, high = config.min_length * width, (config.max_length or 1 << 60) * width
    include, exclude = frozenset(config.include_taxids), frozenset(config.exclude_taxids)
    share = config.max_unknown if config.unknown == "drop" else None
    alphabet = ALPHABETS.get(reading.tokens)
    other = -1 if alphabet is None else alphabet.letters.index(alphabet.other)

    def reason(tokens: bytes, taxid: int) -> str | None:
        length = len(tokens)
        if length < low:
            return "too short"
        if length > high:
            return "too long"
        if taxid in exclude:
            return "TaxID excluded"
        if include and taxid not in include:
            return "TaxID not included"
        if share is not None and tokens.count(other) > share * length:
            return "too many unknown letters"
        return None

    return reason


def _places(task: MapTask, names: list[bytes], representatives: list[str], digests: Words, counts: Counts) -> Floats:
    """Where the records stand in [0, 1), by what decides their splits; see splits.SplitRule.

    representatives: RepIDs, where clusters go by them. With clusters of MMseqs2 all are in train until those are known.
    """
    config = task.config
    if config.split_by != "cluster":
        return identifier_places(names) if config.rule.by == "id" else fractions(digests[:, 1])
    if config.clusters == "mmseqs":
        return np.ones(len(names))
    words = [name.decode() for name in names]
    if task.clusters is not None:
        clusters, listed = task.clusters.look_up(words)
        counts.alone = len(words) - listed
        return fractions(clusters)
    return fractions(hashes(own or accession(word) for own, word in zip(representatives, words, strict=True)))


def numbers(rule: SplitRule, places: Floats) -> npt.NDArray[np.uint8]:
    """An index of SPLITS for each place."""
    valid, test = rule.chosen("valid", places), rule.chosen("test", places)
    return np.where(valid, 1, np.where(test, 2, 0)).astype(np.uint8)


def ordered(
    digests: npt.NDArray[np.uint64],
    split: npt.NDArray[np.uint8],
    identifier: Callable[[int], Any],
    taxid: npt.NDArray[np.int64],
    deduplicate: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """(rows to keep, in the order of the corpus; splits of all rows).

    Of rows with equal digests (n, 2), the one with the smallest (id, TaxID) is kept, and held out (OOD) if any of them
    is. Without ``deduplicate`` all are kept, in that order. identifier: with the text of a row that has one.
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
