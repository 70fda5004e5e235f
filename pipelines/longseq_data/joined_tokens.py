"""Joined proteins in bulk: the stream of packing "concat" as ids in one piece, of which windows are views.

The same samples as streaming.training_windows and StreamSpec.sample give one by one, many times as fast: records are
joined as they were translated by the block, and only those of a letter outside the alphabet are looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from .fasta import Encoder, Record
from .fasta_blocks import EOS_BYTE, Protein
from .masking import mask_rows, masked_counts
from .sharing import Arrays, MakeBatch, Share
from .shuffling import Chunk, endless, shuffled_tokens
from .vocabulary import BOS, RESIDUES, TABLE, UNKNOWN, X

if TYPE_CHECKING:
    from .streaming import StreamSpec


class Special(NamedTuple):
    """A record of letters outside the alphabet, and the place of its first residue."""

    place: int
    record: Protein | Record

    @property
    def end(self) -> int:
        return self.place + self.record.length


class Stretch(NamedTuple):
    """A part of the stream: its ids, and the special records in it. Places count from the start of ``ids``."""

    ids: npt.NDArray[np.uint8]  # read-only; UNKNOWN where a special record has such a letter
    special: list[Special]


def training(spec: StreamSpec, start: int, share: Share, encoder: Encoder) -> Iterator[MakeBatch]:
    """StreamSpec.training of FASTA that is joined."""
    size = spec.length + spec.overlap
    rows = share.batch_sequences
    consumed = start
    for stretch in _stretches(spec, start * spec.length, share.step_samples * spec.length, spec.overlap):
        windows = sliding_window_view(stretch.ids, size)[:: spec.length]
        mine = np.arange((share.rank - consumed) % share.world, share.step_samples, share.world)
        numbers = consumed + mine
        consumed += share.step_samples
        if spec.objective == "masked":
            marks = np.array([_marks(windows[i]) for i in mine.tolist()])
            scored = int(masked_counts(size - marks).sum())
        else:
            scored = spec.length * len(mine)
        facts = {"step_targets": scored, "samples": consumed}
        for first in range(0, len(mine), rows):
            here = slice(first, first + rows)
            yield partial(_batch, spec, encoder, stretch, mine[here], numbers[here], facts)


def _marks(ids: npt.NDArray[np.uint8]) -> int:
    return int(np.count_nonzero((ids >= RESIDUES) & (ids != UNKNOWN)))


def _batch(
    spec: StreamSpec,
    encoder: Encoder,
    stretch: Stretch,
    places: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    facts: dict[str, int],
) -> Arrays:
    tokens = sliding_window_view(stretch.ids, spec.length + spec.overlap)[:: spec.length][places]
    unknown = tokens == UNKNOWN
    if unknown.any():
        for place in (places * spec.length).tolist():
            _look(stretch, place, place + spec.length + spec.overlap, encoder)
        tokens[unknown] = X
    if spec.objective == "causal":
        batch: Arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}  # views of one array, none ignored
    else:
        inputs, targets = mask_rows(tokens, spec.seed, numbers)
        batch = {"tokens": inputs, "targets": targets}
    return {**batch, **{name: np.array(value, dtype=np.int64) for name, value in facts.items()}}


def _look(stretch: Stretch, start: int, stop: int, encoder: Encoder) -> None:
    """Encode the special records of a window one by one, for the encoder to count, to warn, or to refuse."""
    for special in stretch.special:
        first, last = max(start, special.place), min(stop, special.end)
        if first < last:
            encoder.encode(special.record, first - special.place, last - special.place)  # type: ignore[arg-type]


def _stretches(spec: StreamSpec, skip: int, step: int, overlap: int) -> Iterator[Stretch]:
    """The stream from token ``skip`` on, ``step`` tokens at a time and ``overlap`` of the next."""
    pieces = [] if skip else [bytes([BOS])]
    held = len(pieces)  # ids in pieces
    special: list[Special] = []  # places count from the start of the pieces
    for chunk, rest in endless(partial(shuffled_tokens, spec), max(skip - 1, 0), lambda chunk: chunk.sizes + 1):
        joined, found = _joined(chunk)
        special += [Special(held - rest + place, record) for place, record in found]
        pieces.append(joined[rest:] if rest else joined)
        held += len(joined) - rest
        if held < step + overlap:
            continue
        text, place = b"".join(pieces), 0
        ids = np.frombuffer(text, dtype=np.uint8)
        while held - place >= step + overlap:
            stop = place + step + overlap
            here = [Special(at - place, record) for at, record in special if at < stop]
            yield Stretch(ids[place:stop], here)
            place += step
            special = [each for each in special if each.end > place]
        special = [Special(at - place, record) for at, record in special]
        pieces, held = [text[place:]], held - place


def _joined(chunk: Chunk) -> tuple[bytes, list[Special]]:
    """The ids of some records, each followed by EOS, and where the special ones begin."""
    items = chunk.items.tolist()
    special: list[Special] = []
    try:
        return EOS_BYTE.join(items) + EOS_BYTE, special
    except TypeError:  # not all of them are bytes
        begins = np.cumsum(chunk.sizes + 1) - (chunk.sizes + 1)
        for i, item in enumerate(items):
            if not isinstance(item, bytes):
                special.append(Special(int(begins[i]), item))
                items[i] = item.letters.translate(TABLE)
        return EOS_BYTE.join(items) + EOS_BYTE, special
