"""Windows: which part of which document makes a sample, decided from lengths alone.

A window is a plan. Ranks and workers all plan every window, which costs next to nothing, and tokenise only their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longseq_data.readers.documents import Document, DocumentEncoder, Extent
from longseq_data.vocabulary import IGNORE, Tokens

from .rows import Integers, Planned, Rows


class Piece(NamedTuple):
    """Tokens [start, stop) of the row [BOS] residues [EOS] that a document of n residues makes.

    Token 0 is BOS, token i + 1 is residue i, token n + 1 is EOS. Residues are bytes, words or pixels elsewhere.
    ``joined``: token 0 is EOS instead, the end of a document that is not there.
    """

    record: Document
    start: int
    stop: int
    joined: bool = False

    def span(self) -> tuple[int, int]:
        """The residues [first, last) among its tokens."""
        first = max(self.start, 1) - 1
        return first, max(first, min(self.stop - 1, self.record.length))

    def residues(self) -> int:
        first, last = self.span()
        return last - first

    def parts(self, encoder: DocumentEncoder) -> Iterator[Tokens]:
        if self.start == 0:
            yield encoder.eos if self.joined else encoder.bos
        first, last = self.span()
        if last > first:
            yield encoder.encode(self.record, first, last)
        if self.stop == self.record.length + 2:
            yield encoder.eos


def document(record: Document) -> Piece:
    """All of a document: [BOS] residues [EOS], or without EOS where it is not closed."""
    return Piece(record, 0, record.length + 1 + record.closed)


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of one sample, not yet tokenised."""

    pieces: tuple[Piece, ...]

    def size(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def residues(self) -> int:
        return sum(piece.residues() for piece in self.pieces)

    def tokens(self, encoder: DocumentEncoder) -> Tokens:
        """Token ids, shape (size,)."""
        return np.concatenate([part for piece in self.pieces for part in piece.parts(encoder)])

    def segments(self) -> npt.NDArray[np.int32]:
        """Which of its documents each token belongs to, counted from 0: shape (size,)."""
        sizes = [piece.stop - piece.start for piece in self.pieces]
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    def measure(self, encoder: DocumentEncoder, skip: int) -> Extent:
        """What its tokens stand for, without those of the first ``skip`` (0 or 1) tokens."""
        total = Extent(0, 0)
        for number, piece in enumerate(self.pieces):
            first, last = piece._replace(start=piece.start + (skip if number == 0 else 0)).span()
            if last > first:
                total = total.plus(encoder.measure(piece.record, first, last))
        return total


def crop(whole: Piece, size: int, where: float) -> Window:
    """A window of at most ``size`` tokens; ``where`` in [0, 1) chooses among the possible starts."""
    slack = whole.stop - whole.start - size
    if slack <= 0:
        return Window((whole,))
    start = whole.start + int(where * (slack + 1))
    return Window((whole._replace(start=start, stop=start + size),))


def cut(pieces: Iterable[Piece], size: int, overlap: int) -> Iterator[Window]:
    """Cut pieces, read as one stream, into windows of ``size`` tokens that share ``overlap`` with the next one.

    The last window may be shorter. It is left out where it would hold nothing but the overlap.
    """
    held: deque[Piece] = deque()
    tokens = 0
    for piece in pieces:
        held.append(piece)
        tokens += piece.stop - piece.start
        while tokens >= size:
            yield Window(tuple(_first(held, size)))
            _drop(held, size - overlap)
            tokens -= size - overlap
    if tokens > overlap:
        yield Window(tuple(held))


def _first(held: Iterable[Piece], tokens: int) -> Iterator[Piece]:
    for piece in held:
        if piece.stop - piece.start >= tokens:
            yield piece._replace(stop=piece.start + tokens)
            return
        tokens -= piece.stop - piece.start
        yield piece


def _drop(held: deque[Piece], tokens: int) -> None:
    while tokens and tokens >= held[0].stop - held[0].start:
        tokens -= held[0].stop - held[0].start
        held.popleft()
    if tokens:
        held[0] = held[0]._replace(start=held[0].start + tokens)


@dataclass(frozen=True)
class Windows(Planned):
    """Some windows as rows.Chosen."""

    windows: list[Window]
    numbers: Integers
    encoder: DocumentEncoder
    reset: bool

    def rows(self) -> Rows:
        shape = len(self), max(window.size() for window in self.windows)
        rows = np.full(shape, IGNORE, dtype=self.encoder.vocabulary.target_dtype)
        segments = np.full(shape, -1, dtype=np.int32)
        for row, window in enumerate(self.windows):
            rows[row, : window.size()], segments[row, : window.size()] = window.tokens(self.encoder), window.segments()
        return rows, segments if self.reset else None
