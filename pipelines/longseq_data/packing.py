"""Windows: which part of which record makes a sample, decided from lengths alone.

A window is a plan. Ranks and workers all plan every window, which costs next to nothing, and tokenise only their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .fasta import Encoder, Record
from .vocabulary import BOS, EOS

BOS_PART = np.array([BOS], dtype=np.uint8)
EOS_PART = np.array([EOS], dtype=np.uint8)


class Piece(NamedTuple):
    """Tokens [start, stop) of the document [BOS] residues [EOS] that a record of n residues makes.

    Token 0 is BOS, token i + 1 is residue i, token n + 1 is EOS.
    """

    record: Record
    start: int
    stop: int

    def residues(self) -> int:
        return min(self.stop, len(self.record.sequence) + 1) - max(self.start, 1)

    def parts(self, encoder: Encoder) -> Iterator[npt.NDArray[np.uint8]]:
        if self.start == 0:
            yield BOS_PART
        if self.residues() > 0:
            yield encoder.encode(self.record, max(self.start, 1) - 1, self.stop - 1)
        if self.stop == len(self.record.sequence) + 2:
            yield EOS_PART


def document(record: Record) -> Piece:
    """All of a record: [BOS] residues [EOS]."""
    return Piece(record, 0, len(record.sequence) + 2)


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens of one sample, not yet tokenised."""

    pieces: tuple[Piece, ...]

    def size(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def residues(self) -> int:
        return sum(max(piece.residues(), 0) for piece in self.pieces)

    def tokens(self, encoder: Encoder) -> npt.NDArray[np.uint8]:
        """Token ids, shape (size,)."""
        return np.concatenate([part for piece in self.pieces for part in piece.parts(encoder)])


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
