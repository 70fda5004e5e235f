"""A prepared corpus, opened for training: tokens are read from memory-mapped files, and copied once, into the batch.

Two views of a split. Flat: the tokens of all records, one after another; record i is [offsets[i], offsets[i + 1]).
Stream: the same with EOS after each record, so that record i begins at offsets[i] + i; it is what concatenation cuts
windows from.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longseq_data.errors import DataError
from longseq_data.files import user_path
from longseq_data.ingest.block import BlockDocument, stored_dtype
from longseq_data.os_errors import explained
from longseq_data.readers.documents import Extent
from longseq_data.vocabulary import Vocabulary

from .manifest import MANIFEST, OFFSETS, DataFile, read_manifest

if TYPE_CHECKING:
    import pyarrow as pa

Integers = npt.NDArray[np.int64]


def is_corpus(source: str) -> bool:
    """Whether a source names a prepared corpus, be it unfinished or damaged: opening it says so."""
    folder = user_path(source)
    if folder.is_dir():
        marks = (MANIFEST, "dataset_dict.json")
        return folder.name.endswith(".partial") or any((folder / name).is_file() for name in marks)
    return not folder.exists() and folder.with_name(f"{folder.name}.partial").is_dir()


class CorpusRecord(NamedTuple):
    identifier: str
    tokens: npt.NDArray[np.unsignedinteger]  # (length,), read-only, of stored_dtype(vocabulary)
    taxid: int  # -1: unknown


class Corpus:
    """One split of a prepared corpus. Made by ``open``; can be pickled, and is then opened again.

    vocabulary, fingerprint: as the manifest has them.
    tokens: how many there are in all records; len() is the number of records.
    offsets: (records + 1,) int64, memory-mapped.
    """

    def __init__(self, path: Path, split: str) -> None:
        manifest = read_manifest(path)
        if split not in manifest.splits:
            raise DataError(
                f"{path} has no {split} split, only {', '.join(manifest.splits)}; choose one of them, or prepare the "
                f"corpus with one."
            )
        info = manifest.splits[split]
        self.path, self.split = path, split
        self.vocabulary: Vocabulary = manifest.vocabulary
        self.fingerprint = manifest.fingerprint
        self.tokens = info.tokens
        arrow = [file for file in info.files if file.rows is not None]
        for file in info.files:
            _check_size(path, file)
        self.offsets: Integers = _mapped_offsets(path / split / OFFSETS, info.records, info.tokens)
        self._batches = [batch for file in arrow for batch in _batches(path / file.name, file)]
        rows = [batch.num_rows for batch in self._batches]
        self._values: list[npt.NDArray[Any]] = [batch.column("tokens").values.to_numpy() for batch in self._batches]
        self._first_rows = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)  # of each batch, and the end
        self._first_tokens = self.offsets[self._first_rows]  # the same in the flat view
        if not np.array_equal(np.diff(self._first_tokens), [values.size for values in self._values]):
            raise DataError(
                f"{path / split} has changed since it was prepared: {OFFSETS} does not fit its Arrow files; prepare it "
                f"again."
            )
        # for loops over a few windows, in which lists and a memoryview are several times as fast as arrays
        self._token_borders: list[int] = self._first_tokens.tolist()
        self._place_borders: list[int] = (self._first_tokens + self._first_rows).tolist()  # in the stream
        self._ends = memoryview(self.offsets)[1:]  # type: ignore[arg-type]
        self._counted = lru_cache(maxsize=64)(self._document)

    @classmethod
    def open(cls, path: str | Path, split: str) -> Corpus:
        """Raises DataError where there is no whole corpus, where it lacks the split, and where its files have changed.

        Sizes are checked; ``verify`` reads everything.
        """
        return cls(user_path(path).absolute(), split)

    def __reduce__(self) -> tuple[Callable[..., Corpus], tuple[Path, str]]:
        return type(self), (self.path, self.split)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def stream_tokens(self) -> int:
        """Tokens of the stream: those of the records, and an EOS for each."""
        return self.tokens + len(self)

    def lengths(self, records: npt.ArrayLike) -> Integers:
        """Tokens of each record, of the shape of ``records``."""
        chosen = np.asarray(records, dtype=np.int64)
        return self.offsets[chosen + 1] - self.offsets[chosen]

    def identifiers(self) -> Iterator[list[str]]:
        """Those of all records in their order, some at a time."""
        for batch in self._batches:
            yield batch["id"].to_pylist()

    def record(self, index: int) -> CorpusRecord:
        """Record ``index``, counted from 0. Raises IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._first_rows, index, "right")) - 1
        row = index - int(self._first_rows[number])
        start = int(self.offsets[index] - self._first_tokens[number])
        stop = int(self.offsets[index + 1] - self._first_tokens[number])
        batch = self._batches[number]
        return CorpusRecord(batch["id"][row].as_py(), self._values[number][start:stop], batch["taxid"][row].as_py())

    def measure(self, record: int, start: int, stop: int) -> Extent:
        """What the tokens [start, stop) of a record stand for."""
        return self._counted(record).measure(start, stop)

    def _document(self, record: int) -> BlockDocument:
        number = int(np.searchsorted(self._first_rows, record, "right")) - 1
        batch, row = self._batches[number], record - int(self._first_rows[number])
        text = batch["text"][row].as_py() if "text" in batch.schema.names else None
        return BlockDocument(b"", "", self.record(record).tokens, 0, self.vocabulary, text)

    def rows(self, start: int, stop: int) -> Iterator[CorpusRecord]:
        """Records [start, stop) in their order, faster than one by one."""
        for number, begin, end in _pieces(self._first_rows.tolist(), start, stop):
            first, batch = int(self._first_rows[number]), self._batches[number].slice(begin, end - begin)
            borders = self.offsets[first + begin : first + end + 1] - self._first_tokens[number]
            values = self._values[number]
            tokens = [values[low:high] for low, high in pairwise(borders.tolist())]
            yield from map(CorpusRecord, batch["id"].to_pylist(), tokens, batch["taxid"].to_pylist())

    def batches(self) -> Iterator[tuple[int, Integers, npt.NDArray[Any]]]:
        """Of each record batch on disk: its first record, the offsets that it has itself, and its tokens."""
        for first, batch, values in zip(self._first_rows.tolist(), self._batches, self._values, strict=False):
            yield first, batch.column("tokens").offsets.to_numpy(), values

    def read(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Tokens [start, stop) of the flat view, as they are stored; read-only where no copy is needed."""
        _check_range(np.array([start]), stop - start, self.tokens)
        parts = [self._values[n][first:last] for n, first, last in _pieces(self._token_borders, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, stored_dtype(self.vocabulary)), *parts])

    def gather(
        self,
        starts: npt.ArrayLike,
        lengths: npt.ArrayLike,
        out: npt.NDArray[Any] | None = None,
        fill: int | None = None,
    ) -> npt.NDArray[Any]:
        """Row i: tokens [starts[i], starts[i] + lengths[i]) of the flat view, then ``fill``.

        starts, lengths: (B,) integers. out: (B, at least the longest) array of any integer dtype that holds the ids;
        default: a new one in the vocabulary's dtype. fill: default PAD. Returns ``out``. Raises ValueError for what
        lies outside the corpus or does not fit.
        """
        first, sizes = np.broadcast_arrays(np.asarray(starts, np.int64), np.asarray(lengths, np.int64))
        longest = int(sizes.max(initial=0))
        if out is None:
            out = np.empty((first.size, longest), self.vocabulary.dtype)
        if out.ndim != 2 or out.shape[0] != first.size or out.shape[1] < longest:
            raise ValueError(f"out has shape {out.shape}; {first.size} rows of up to {longest} tokens do not fit")
        _check_range(first, sizes, self.tokens)
        if sizes.min(initial=longest) < out.shape[1]:
            out[...] = self.vocabulary.pad if fill is None else fill
        numbers = np.searchsorted(self._first_tokens, first, "right") - 1
        whole = first + sizes <= self._first_tokens[np.minimum(numbers + 1, len(self._values))]
        numbers = np.minimum(numbers, len(self._values) - 1)  # nothing, from the very end
        begins = first - self._first_tokens[numbers]
        values = self._values
        places = zip(numbers.tolist(), begins.tolist(), (begins + sizes).tolist(), whole.tolist(), strict=True)
        for row, (number, begin, end, inside) in zip(out, places, strict=True):
            if inside:
                row[: end - begin] = values[number][begin:end]
            else:
                start = int(self._first_tokens[number]) + begin
                row[: end - begin] = self.read(start, start + end - begin)
        return out

    def stream_window(
        self,
        starts: npt.ArrayLike,
        length: int,
        out: npt.NDArray[Any] | None = None,
        records: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[Any]:
        """Row i: tokens [starts[i], starts[i] + length) of the stream, in which each record is followed by EOS.

        starts: (B,) integers. out: as in ``gather``, (B, length). records: (B, length) int64, filled with the number of
        the record that each position belongs to; its EOS belongs to it. Returns ``out``. Raises ValueError for a window
        that is not inside the stream.
        """
        first = np.asarray(starts, np.int64)
        if out is None:
            out = np.empty((first.size, length), self.vocabulary.dtype)
        for array in (out, out if records is None else records):
            if array.shape != (first.size, length):
                raise ValueError(f"an array of shape {array.shape} is no place for {first.size} windows of {length}")
        _check_range(first, length, self.stream_tokens)
        for i, start in enumerate(first.tolist()):
            for number, begin, end in _pieces(self._place_borders, start, start + length):
                place = self._place_borders[number] + begin - start
                here = np.s_[i, place : place + end - begin]
                self._fill(number, begin, end, out[here], None if records is None else records[here])
        return out

    def _eos(self, record: int) -> int:
        """The place in the stream of a record's EOS."""
        return self._ends[record] + record

    def _fill(self, number: int, begin: int, end: int, row: npt.NDArray[Any], records: Integers | None) -> None:
        """Stream places [begin, end), counted within batch ``number``, into ``row``."""
        first_row, last_row = int(self._first_rows[number]), int(self._first_rows[number + 1])
        base = self._place_borders[number] + begin
        # the first records whose EOS stands at begin or later, and at end or later
        low = bisect_left(range(last_row), base, first_row, key=self._eos)
        high = bisect_left(range(last_row), base + end - begin, low, min(last_row, low + end - begin), key=self._eos)
        marks = self.offsets[low + 1 : high + 1] + (np.arange(low, high) - base)
        skipped = low - first_row  # EOS before this place
        values = self._values[number][begin - skipped : end - skipped - marks.size]
        if marks.size == 0:
            row[:] = values
        elif marks.size * 64 < row.size:  # few and long pieces
            place = taken = 0
            for mark in marks.tolist():
                row[place:mark] = values[taken : taken + mark - place]
                taken += mark - place
                place = mark + 1
            row[place:] = values[taken:]
            row[marks] = self.vocabulary.eos
        else:
            inside = np.ones(row.size, dtype=bool)
            inside[marks] = False
            row[inside] = values
            row[marks] = self.vocabulary.eos
        if records is not None:
            borders = np.concatenate([[0], marks + 1, [row.size]])
            records[:] = np.repeat(np.arange(low, high + 1), np.diff(np.minimum(borders, row.size)))


def _pieces(borders: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """[start, stop) cut at ``borders``: (number of the piece, begin and end within it)."""
    number = bisect_right(borders, start) - 1
    while start < stop:
        end = min(stop, borders[number + 1])
        yield number, start - borders[number], end - borders[number]
        start, number = end, number + 1


def _check_range(starts: Integers, lengths: npt.ArrayLike, size: int) -> None:
    sizes = np.asarray(lengths)
    if starts.size and (starts.min() < 0 or sizes.min() < 0 or (starts + sizes).max() > size):
        raise ValueError(f"tokens {starts.min()} to {(starts + sizes).max()} are not all in a corpus of {size}")


def _check_size(folder: Path, file: DataFile) -> None:
    path = folder / file.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it, or prepare the corpus again.") from None
    except OSError as error:
        raise DataError(f"{explained(error, path, 'cannot be read')}.") from None
    if size != file.size:
        raise DataError(
            f"{path} has changed since it was prepared: {size:,} bytes, not {file.size:,}; restore it, or prepare the "
            f"corpus again."
        )


def _mapped_offsets(path: Path, records: int, tokens: int) -> Integers:
    try:
        offsets = np.asarray(np.load(path, mmap_mode="r"))  # a plain array over the map: NumPy's own class is slow
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{explained(error, path, 'cannot be read')}.") from None
        raise DataError(f"{path} cannot be read ({error}); restore it, or prepare the corpus again.") from None
    if offsets.shape != (records + 1,) or offsets.dtype != np.int64 or offsets[0] != 0 or offsets[-1] != tokens:
        raise DataError(f"{path} has changed since it was prepared; restore it, or prepare the corpus again.")
    return offsets


def _batches(path: Path, file: DataFile) -> list[pa.RecordBatch]:
    """The record batches of an Arrow stream, memory-mapped; the file itself does not stay open."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as handle, pa.ipc.open_stream(handle) as reader:
            batches = list(reader)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{explained(error, path, 'cannot be read')}.") from None
        sentence = " ".join(str(error).split())
        raise DataError(f"{path} is damaged ({sentence}); restore it, or prepare the corpus again.") from None
    if sum(batch.num_rows for batch in batches) != file.rows:
        raise DataError(f"{path} has changed since it was prepared; restore it, or prepare the corpus again.")
    return batches
