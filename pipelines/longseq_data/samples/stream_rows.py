"""Training samples of streamed files, planned as their records come: one record each, or windows of all of them joined.

Every process plans all samples, which costs little beyond their lengths, and makes rows of its own ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from longseq_data.ingest.block import stored_dtype
from longseq_data.randomness import uniforms
from longseq_data.vocabulary import IGNORE

from .chunks import Chunk
from .infilling import Pieces
from .masking import masked_counts
from .rows import Crop, Integers, Planned, Rows, Taken, mark_ends, residues_of, turn_of
from .shuffling import endless, shuffled
from .stream_settings import StreamSettings


class Crops:
    """Sample g is record g of the endless order, cropped."""

    ahead = 0  # records take memory

    def __init__(self, spec: StreamSettings, start: int) -> None:
        self._spec, self._at = spec, start
        self._crop = Crop(spec.length, spec.objective == "causal", 1 + spec.vocabulary.closed)
        self._chunks = endless(partial(shuffled, spec), start, lambda chunk: np.ones_like(chunk.sizes))
        self._held = Chunk.of([], [])

    def take(self, numbers: Integers, until: int) -> Taken:
        """See sharing.Taker."""
        spec, count = self._spec, until - self._at
        parts = [self._held]
        while sum(map(len, parts)) < count:
            parts.append(next(self._chunks)[0])
        joined = Chunk.joined(parts) if len(parts) > 1 else self._held
        items = joined.items[numbers - self._at]
        self._held, self._at = joined[count:], until
        lengths = np.fromiter(map(len, items.tolist()), np.int64, len(items))
        where = uniforms(spec.seed, "crop", numbers) if spec.crop == "random" else None
        starts = self._crop.starts(lengths, where)
        sizes = self._crop.sizes(starts, lengths)
        return _Cropped(spec, numbers, items, lengths, starts, sizes, self._crop.scored(starts, sizes, lengths))


@dataclass(frozen=True)
class _Cropped(Planned):
    PER_SAMPLE = ("numbers", "items", "lengths", "begins", "sizes", "scored")
    spec: StreamSettings
    numbers: Integers
    items: npt.NDArray[np.object_]
    lengths: Integers
    begins: Integers
    sizes: Integers
    scored: Integers

    def pieces(self) -> Pieces:
        first, last = residues_of(self.begins, self.sizes, self.lengths)
        return Pieces.one_each(self.begins == 0, last - first, self.begins + self.sizes == self.lengths + 2)

    def rows(self) -> Rows:
        vocabulary, width = self.spec.vocabulary, int(self.sizes.max())
        first, last = residues_of(self.begins, self.sizes, self.lengths)
        begun = self.begins == 0
        if vocabulary.size <= 128:  # all ids, and IGNORE, are signed bytes
            ended = self.begins + self.sizes == self.lengths + 2
            bos, eos, fill = (bytes([mark & 255]) for mark in (vocabulary.bos, vocabulary.eos, IGNORE))
            places = zip(self.items.tolist(), *(each.tolist() for each in (first, last, begun, ended)), strict=True)
            text = b"".join(
                [(bos * a + item[low:high] + eos * z).ljust(width, fill) for item, low, high, a, z in places]
            )
            rows = np.frombuffer(text, np.int8).reshape(len(self), width).astype(vocabulary.target_dtype)
        else:
            rows = self._wide(first, last, begun, width)
        turn = turn_of(self.spec)
        return turn.of((rows, None), self.numbers) if turn else (rows, None)

    def _wide(self, first: Integers, last: Integers, begun: npt.NDArray[np.bool_], width: int) -> npt.NDArray[Any]:
        vocabulary, stored = self.spec.vocabulary, stored_dtype(self.spec.vocabulary)
        room, size = b"\0" * stored.itemsize, width * stored.itemsize  # of BOS, and of a row
        places = zip(self.items.tolist(), first.tolist(), last.tolist(), begun.tolist(), strict=True)
        text = b"".join([(room * bos + bytes(item[low:high])).ljust(size, b"\0") for item, low, high, bos in places])
        rows = np.frombuffer(text, stored).reshape(len(self), width).astype(vocabulary.target_dtype)
        for row in np.flatnonzero(self.sizes < width).tolist():  # faster than a mask of all places
            rows[row, self.sizes[row] :] = IGNORE
        mark_ends(rows, self.begins, self.sizes, self.lengths, vocabulary)
        return rows


class Joined:
    """Sample g is window g of the stream BOS, residues EOS, residues EOS, ...; with reset of BOS residues EOS, BOS ...

    Windows have ``length`` positions, and ``overlap`` tokens of the next one.
    """

    ahead = 0

    def __init__(self, spec: StreamSettings, start: int) -> None:
        vocabulary = spec.vocabulary
        self._spec, self._at = spec, start
        self._marks = spec.reset, vocabulary.closed  # before a record, and behind it
        stored = stored_dtype(vocabulary)
        self._dtype = stored if vocabulary.size <= 1 << 8 * stored.itemsize else vocabulary.dtype
        skip, lone = start * spec.length, not spec.reset  # a lone BOS at the beginning
        ids = [vocabulary.bos] if lone and not skip else []
        self._ids: npt.NDArray[np.unsignedinteger] = np.array(ids, dtype=self._dtype)
        self._documents = np.zeros(0, dtype=np.int32)  # with reset: the number of each id's
        self._chunks = endless(partial(shuffled, spec), max(skip - lone, 0), self._positions)

    def _positions(self, chunk: Chunk) -> Integers:
        return _lengths(chunk) + sum(self._marks)

    def take(self, numbers: Integers, until: int) -> Taken:
        """See sharing.Taker."""
        spec, count = self._spec, until - self._at
        ids, documents = [self._ids], [self._documents]
        held, needed = len(self._ids), count * spec.length + spec.overlap
        while held < needed:
            chunk, rest = next(self._chunks)
            ids.append(self._joined(chunk)[rest:])
            held += len(ids[-1])
            if spec.reset:
                lengths = self._positions(chunk)
                last = int(documents[-1][-1]) if len(documents[-1]) else -1
                documents.append(np.repeat(np.arange(last + 1, last + 1 + len(chunk), dtype=np.int32), lengths)[rest:])
        self._ids = ids[0] if len(ids) == 1 else np.concatenate(ids)
        size, mine = spec.length + spec.overlap, numbers - self._at
        windows = _windows(self._ids, size, spec.length)
        scored = np.full(len(mine), spec.length)
        of: npt.NDArray[np.int32] | None = None
        if spec.reset:
            self._documents = documents[0] if len(documents) == 1 else np.concatenate(documents)
            of = _windows(self._documents, size, spec.length)
            if spec.objective == "causal":  # no document tells how the next one begins
                scored -= of[mine, -1] - of[mine, 0]
            self._documents = self._documents[count * spec.length :] - self._documents[0]
        if spec.objective == "masked":
            ordinary = [np.count_nonzero(windows[i] < spec.vocabulary.ordinary) for i in mine.tolist()]
            scored = masked_counts(np.array(ordinary, dtype=np.int64))
        self._ids, self._at = self._ids[count * spec.length :], until
        return _Windows(spec, numbers, mine, scored, windows, of)

    def _joined(self, chunk: Chunk) -> npt.NDArray[np.unsignedinteger]:
        """Its records one after another, with their marks."""
        vocabulary, (before, behind) = self._spec.vocabulary, self._marks
        marks = [vocabulary.eos] * behind + [vocabulary.bos] * before
        if self._dtype.itemsize == 1:
            text = bytes(marks).join(chunk.items.tolist())
            return np.frombuffer(bytes(marks[behind:]) + text + bytes(marks[:behind]), dtype=np.uint8)
        lengths = self._positions(chunk)
        ends = np.cumsum(lengths)
        out = np.empty(int(ends[-1]), dtype=self._dtype)
        plain = np.ones(len(out), dtype=bool)
        for places, token in compress(((ends - lengths, vocabulary.bos), (ends - 1, vocabulary.eos)), self._marks):
            out[places], plain[places] = token, False
        out[plain] = np.frombuffer(b"".join(chunk.items.tolist()), stored_dtype(vocabulary))
        return out


@dataclass(frozen=True)
class _Windows(Planned):
    PER_SAMPLE = ("numbers", "places", "scored")
    spec: StreamSettings
    numbers: Integers
    places: Integers  # in ``windows``
    scored: Integers
    windows: npt.NDArray[np.unsignedinteger]
    documents: npt.NDArray[np.int32] | None

    def pieces(self) -> Pieces:
        return Pieces.of_rows(self.windows[self.places], self.spec.vocabulary)

    def rows(self) -> Rows:
        rows = self.windows[self.places]
        segments = None if self.documents is None else self.documents[self.places]
        found = rows, None if segments is None else segments - segments[:, :1]
        turn = turn_of(self.spec)
        return turn.of(found, self.numbers) if turn else found


def _windows(ids: npt.NDArray[Any], size: int, step: int) -> npt.NDArray[Any]:
    """A view: every ``step`` places ``size`` ids. NumPy's own sliding_window_view takes as long as a whole batch."""
    shape, width = ((len(ids) - size) // step + 1, size), ids.itemsize
    return np.ndarray(shape, ids.dtype, ids, strides=(step * width, width))


def _lengths(chunk: Chunk) -> Integers:
    return np.fromiter(map(len, chunk.items.tolist()), np.int64, len(chunk))
