"""The second half of a preparation: one range of hashes after another is merged, and written as Arrow files.

A corpus has a power of two of shards, chosen from its size alone; shard i holds the i-th part of all hashes. So its
bytes depend neither on the number of workers, nor on the blocks, nor on the memory at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from longseq_data.corpus.manifest import count_lengths
from longseq_data.files import write_text
from longseq_data.ingest.block import stored_dtype
from longseq_data.vocabulary import Vocabulary

from .map_stage import SPLITS, ordered

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SHARDS = 128  # `datasets` keeps every file of a corpus open, and 1,024 open files are a usual limit
SHARD_BYTES = 16 << 20  # a corpus is cut into shards of at least this size while there are fewer than MAX_SHARDS
BATCH_TOKENS = 1 << 24  # a record batch is closed when it holds so many tokens or
BATCH_ROWS = 1 << 16  # so many rows
CELL_BITS = 7  # rows are digested by the first bits of their hashes, whatever the number of shards
WORD = 64


class Part(TypedDict):
    """What one shard holds of one split."""

    rows: int
    tokens: int
    size: int
    sha256: str
    lengths: dict[str, int]
    shortest: int
    longest: int
    cells: dict[str, str]  # cell -> digest of its rows


@dataclass(frozen=True)
class ReduceTask:
    """folder: for the shards. parts: the files put aside by the first half. ranges: pieces of a shard, for memory."""

    folder: Path
    parts: tuple[Path, ...]
    vocabulary: Vocabulary
    written: bool  # by a tokenizer: rows have the text that it read
    deduplicate: bool
    shards: int
    ranges: int
    split: Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None = None
    # of (keys, splits so far): where it was not known in the first half

    def arrow(self, shard: int, split: str) -> Path:
        return self.folder / f"{shard:03d}-{split}.arrow"

    def notes(self, shard: int) -> Path:
        """Written last: a shard with notes is whole."""
        return self.folder / f"{shard:03d}.json"


def shard_count(size: int) -> int:
    """How many shards a corpus of ``size`` bytes (tokens and ids) has: a power of two."""
    return min(MAX_SHARDS, 1 << max(1, size // SHARD_BYTES).bit_length() - 1)


def reduce_shard(task: ReduceTask, shard: int) -> None:
    """Write one shard of every split that has rows in it, then its notes. Raises OSError where the disk is full."""
    writers: dict[str, ShardWriter] = {}
    try:
        for start, stop in _borders(task, shard):
            rows = _rows(task, start, stop)
            for number, name in enumerate(SPLITS):
                some = rows.of_split(number)
                if some.records:
                    if name not in writers:
                        writers[name] = ShardWriter(task.arrow(shard, name), schema(task.vocabulary, task.written))
                    writers[name].add(some)
        notes = {name: writer.close() for name, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_text(task.notes(shard), json.dumps(notes))


def read_parts(task: ReduceTask, shard: int) -> dict[str, Part]:
    return json.loads(task.notes(shard).read_text())


def records_of(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(identifier, tokens) of each record of a finished file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as handle, pa.ipc.open_stream(handle) as reader:
        for batch in reader:
            tokens = batch.column("tokens")
            for number, identifier in enumerate(batch.column("id").to_pylist()):
                yield identifier, tokens[number].values.to_numpy()


def all_rows(task: ReduceTask) -> Iterator[Rows]:
    """All rows, in the order of the corpus; duplicates dropped."""
    for shard in range(task.shards):
        for start, stop in _borders(task, shard):
            yield _rows(task, start, stop)


def _borders(task: ReduceTask, shard: int) -> Iterator[tuple[int, int]]:
    """First and last key of each range of a shard."""
    total = task.shards * task.ranges
    for part in range(shard * task.ranges, (shard + 1) * task.ranges):
        yield (part << WORD) // total, (part + 1 << WORD) // total - 1


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the corpus, some of one split."""

    digests: npt.NDArray[np.uint64]  # (n, 2)
    split: npt.NDArray[np.uint8]
    taxid: npt.NDArray[np.int64]
    columns: dict[str, pa.LargeBinaryArray]  # id, tokens, and the text of rows that have one
    order: npt.NDArray[np.int64]  # which rows, and in which order

    @property
    def records(self) -> int:
        return self.order.size

    def of_split(self, split: int) -> Rows:
        order = self.order[self.split[self.order] == split]
        return replace(self, order=order)


def _rows(task: ReduceTask, start: int, stop: int) -> Rows:
    """The rows whose keys are in [start, stop], of all files put aside; duplicates dropped."""
    import pyarrow as pa

    parts = []
    for path in task.parts:
        with pa.memory_map(str(path)) as handle, pa.ipc.open_file(handle) as file:
            batch = file.get_batch(0)
        keys = batch.column("key").to_numpy()
        low = np.searchsorted(keys, np.uint64(start), "left")
        high = np.searchsorted(keys, np.uint64(stop), "right")
        # a copy, so that no more than one file is mapped at a time
        copy = batch.slice(low, high - low).serialize()
        parts.append(pa.ipc.read_record_batch(copy, batch.schema.remove_metadata()))
    table = pa.Table.from_batches(parts).combine_chunks()
    del parts
    if not table.num_rows:
        empty = np.empty(0, dtype=np.int64)
        return Rows(np.empty((0, 2), np.uint64), empty.astype(np.uint8), empty, {}, empty)
    column = {name: table.column(name).chunk(0) for name in table.column_names}
    digests = np.stack([column["key"].to_numpy(), column["rest"].to_numpy()], axis=1)
    taxid, split = column["taxid"].to_numpy(), column["split"].to_numpy()
    columns = {name: column[name] for name in ("id", "tokens", "text") if name in column}
    named = [columns[name] for name in ("id", "text") if name in columns]
    if task.split is not None:
        split = task.split(digests[:, 0], split)
    order, split = ordered(digests, split, lambda row: [each[row].as_py() for each in named], taxid, task.deduplicate)
    return Rows(digests, split, taxid, columns, order)


class _Hashed:
    """A file that is written and hashed at once."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle, self.size, self.sha256 = handle, 0, hashlib.sha256()
        self.closed = False

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        self.handle.write(view)
        self.sha256.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self.handle.flush()


class RowDigest:
    """A hash of rows that does not depend on how they are handed over."""

    def __init__(self) -> None:
        self._columns = [hashlib.blake2b(digest_size=16) for _ in range(4)]

    def update(
        self,
        digests: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.int64],
        identifiers: bytes,
        taxids: npt.NDArray[Any],
    ) -> None:
        """digests: (n, 2). lengths: of the identifiers, in bytes. identifiers: one after another."""
        columns = digests.astype("<u8").tobytes(), lengths.astype("<i8").tobytes(), identifiers
        for column, data in zip(self._columns, (*columns, taxids.astype("<i8").tobytes()), strict=True):
            column.update(data)

    def hexdigest(self) -> str:
        joined = b"".join(column.digest() for column in self._columns)
        return hashlib.blake2b(joined, digest_size=16).hexdigest()


def split_digest(cells: dict[int, str]) -> str:
    """The digest of a split from those of its cells."""
    return hashlib.sha256(json.dumps(sorted(cells.items())).encode()).hexdigest()


def schema(vocabulary: Vocabulary, written: bool) -> pa.Schema:
    """Columns of a corpus, with the note by which `datasets` knows their types. written: with the rows' texts."""
    import pyarrow as pa

    stored = stored_dtype(vocabulary)
    features = {
        "id": {"dtype": "string", "_type": "Value"},
        "tokens": {"feature": {"dtype": str(stored), "_type": "Value"}, "_type": "LargeList"},
        "taxid": {"dtype": "int64", "_type": "Value"},
    }
    types = {"id": pa.string(), "tokens": pa.large_list(pa.from_numpy_dtype(stored)), "taxid": pa.int64()}
    if written:
        features["text"] = {"dtype": "large_binary", "_type": "Value"}
        types["text"] = pa.large_binary()
    return pa.schema(types, metadata={"huggingface": json.dumps({"info": {"features": features}})})


class ShardWriter:
    """Writes rows of one split to an Arrow stream, in record batches whose borders depend on the rows alone."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow as pa

        self._path, self._aside = path, path.with_suffix(f".{os.getpid()}.partial")
        self._dtype = np.dtype(schema.field("tokens").type.value_type.to_pandas_dtype())
        self._file = _Hashed(self._aside.open("wb"))
        self._schema = schema
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), self._schema)
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_tokens = self._waiting_rows = 0
        self._rows = self._tokens = 0
        self._lengths: dict[int, int] = {}
        self._range = (1 << 62, 0)
        self._cells: dict[int, RowDigest] = {}

    def add(self, rows: Rows) -> None:
        import pyarrow as pa

        order = pa.array(rows.order)
        columns = {name: column.take(order) for name, column in rows.columns.items()}
        offsets, values = _buffers(columns["tokens"], self._dtype)
        self._note(rows, columns["id"], np.diff(offsets))
        columns["id"] = columns["id"].cast(pa.string())
        columns["tokens"] = pa.LargeListArray.from_arrays(offsets, values)
        columns["taxid"] = pa.array(rows.taxid[rows.order])
        batch = pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema)
        start = 0
        while start < batch.num_rows:
            taken = np.cumsum(np.diff(offsets[start:])) + self._waiting_tokens
            full = int(np.searchsorted(taken, BATCH_TOKENS)) + 1
            stop = min(start + full, start + BATCH_ROWS - self._waiting_rows, batch.num_rows)
            self._waiting.append(batch.slice(start, stop - start))
            self._waiting_tokens += int(offsets[stop] - offsets[start])
            self._waiting_rows += stop - start
            if self._waiting_tokens >= BATCH_TOKENS or self._waiting_rows >= BATCH_ROWS:
                self._flush()
            start = stop

    def close(self) -> Part:
        """Put the file under its name; what it holds."""
        self._flush()
        self._writer.close()
        handle = self._file.handle
        handle.flush()
        os.fsync(handle.fileno())
        handle.close()
        self._aside.replace(self._path)
        return {
            "rows": self._rows,
            "tokens": self._tokens,
            "size": self._file.size,
            "sha256": self._file.sha256.hexdigest(),
            "lengths": {str(length): count for length, count in self._lengths.items()},
            "shortest": self._range[0],
            "longest": self._range[1],
            "cells": {str(cell): row_digest.hexdigest() for cell, row_digest in self._cells.items()},
        }

    def discard(self) -> None:
        """Leave nothing behind; after a failure."""
        self._file.handle.close()
        self._aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_batch(pa.concat_batches(self._waiting))
            self._waiting.clear()
            self._waiting_tokens = self._waiting_rows = 0

    def _note(self, rows: Rows, identifiers: pa.LargeBinaryArray, lengths: npt.NDArray[np.int64]) -> None:
        self._rows += lengths.size
        self._tokens += int(lengths.sum())
        self._range = min(self._range[0], int(lengths.min())), max(self._range[1], int(lengths.max()))
        for length, count in count_lengths(lengths).items():
            self._lengths[length] = self._lengths.get(length, 0) + count
        digests, taxid = rows.digests[rows.order], rows.taxid[rows.order]
        offsets, characters = _buffers(identifiers, np.dtype(np.uint8))
        cells = digests[:, 0] >> np.uint64(WORD - CELL_BITS)
        borders = np.flatnonzero(np.diff(cells)) + 1
        for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), lengths.size], strict=True):
            self._cells.setdefault(int(cells[start]), RowDigest()).update(
                digests[start:stop],
                np.diff(offsets[start : stop + 1]),
                characters[offsets[start] : offsets[stop]].tobytes(),
                taxid[start:stop],
            )


def _buffers(array: pa.LargeBinaryArray, dtype: np.dtype) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """(offsets, values) of a fresh binary array, its bytes read as ``dtype``; no copy of the values."""
    _, offsets, values = array.buffers()
    borders = np.frombuffer(offsets, dtype=np.int64, count=len(array) + 1)
    return borders // dtype.itemsize, np.frombuffer(values, dtype=dtype, count=int(borders[-1]) // dtype.itemsize)
