"""Joined proteins in bulk: the stream of packing "concat" as letters, translated once for each micro-batch.

The same samples as streaming.training_windows and StreamSpec.sample give one by one, several times as fast: records are
joined as they were read, and only those of a letter outside the alphabet are looked at again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .documents import Document
from .fasta import UNKNOWN_BYTE, UNKNOWN_TO_X, Encoder
from .masking import mask_tokens, masked_counts
from .sharing import Arrays, MakeBatch, Share
from .shuffling import Chunk, shuffled_chunks
from .vocabulary import BOS, EOS, IGNORE, PROTEIN, TABLE

if TYPE_CHECKING:
    from .streaming import StreamSpec

# No letter of a record is one of these: they are no printable characters.
END, BEGIN = b"\n", b"\x02"
LETTERS_TO_TOKENS = bytes({END[0]: EOS, BEGIN[0]: BOS}.get(byte, TABLE[byte]) for byte in range(256))


class Stretch(NamedTuple):
    """A part of the stream: its letters, the records in it, and where each of them ends, EOS included."""

    letters: bytes
    records: list[Document]
    ends: list[int]  # places in ``letters``


def training(spec: StreamSpec, start: int, share: Share, encoder: Encoder) -> Iterator[MakeBatch]:
    """StreamSpec.training of FASTA that is joined."""
    size = spec.length + spec.overlap
    rows = share.batch_sequences
    consumed = start
    for stretch in _stretches(spec, start * spec.length, share.step_samples * spec.length, spec.overlap):
        letters = np.frombuffer(stretch.letters, dtype=np.uint8)
        windows = np.lib.stride_tricks.as_strided(
            letters, (share.step_samples, size), (spec.length, 1), writeable=False
        )
        mine = np.arange((share.rank - consumed) % share.world, share.step_samples, share.world)
        numbers = consumed + mine
        consumed += share.step_samples
        if spec.objective == "masked":
            marks = [np.count_nonzero((windows[i] == END[0]) | (windows[i] == BEGIN[0])) for i in mine.tolist()]
            scored = int(masked_counts(size - np.array(marks)).sum())
        else:
            scored = spec.length * len(mine)
        facts = {"step_targets": scored, "samples": consumed}
        for first in range(0, len(mine), rows):
            here = slice(first, first + rows)
            yield partial(_batch, spec, encoder, stretch, windows[mine[here]], mine[here], numbers[here], facts)


def _batch(
    spec: StreamSpec,
    encoder: Encoder,
    stretch: Stretch,
    windows: npt.NDArray[np.uint8],
    places: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    facts: dict[str, int],
) -> Arrays:
    ids = windows.tobytes().translate(LETTERS_TO_TOKENS)
    if UNKNOWN_BYTE in ids:
        for place in (places * spec.length).tolist():
            _look(stretch, place, place + spec.length + spec.overlap, encoder)
        ids = ids.translate(UNKNOWN_TO_X)
    tokens = np.frombuffer(ids, dtype=np.uint8).reshape(windows.shape)
    if spec.objective == "causal":
        wide = tokens.astype(PROTEIN.target_dtype)
        batch = {"tokens": wide[:, :-1], "targets": wide[:, 1:]}
    else:
        inputs, targets = (np.full(tokens.shape, IGNORE, PROTEIN.target_dtype) for _ in range(2))
        for i, number in enumerate(numbers.tolist()):
            inputs[i], targets[i] = mask_tokens(tokens[i], spec.seed, number, PROTEIN)
        batch = {"tokens": inputs, "targets": targets}
    return {**batch, **{name: np.array(value, dtype=np.int64) for name, value in facts.items()}}


def _look(stretch: Stretch, start: int, stop: int, encoder: Encoder) -> None:
    """Encode the records of a window one by one, for the encoder to count, to warn, or to refuse."""
    number = bisect_right(stretch.ends, start)
    while number < len(stretch.records):
        record, end = stretch.records[number], stretch.ends[number]
        first = end - 1 - record.length
        if first >= stop:
            return
        encoder.encode(record, max(start - first, 0), min(stop - first, record.length))  # type: ignore[arg-type]
        number += 1


def _stretches(spec: StreamSpec, skip: int, step: int, overlap: int) -> Iterator[Stretch]:
    """The stream from token ``skip`` on, ``step`` tokens at a time and ``overlap`` of the next."""
    records: list[Document] = []
    pieces: list[bytes] = [] if skip else [BEGIN]
    held = len(pieces)  # letters in pieces
    begin = 0  # the place in the letters held at which the first of the records begins; negative: it is cut
    if not skip:
        begin = 1
    for chunk, rest in _endless(spec, max(skip - 1, 0)):
        text = END.join([record.letters for record in chunk]) + END  # type: ignore[attr-defined]
        if rest:
            text, begin = text[rest:], -rest
        pieces.append(text)
        records.extend(chunk)
        held += len(text)
        if held < step + overlap:
            continue
        letters = b"".join(pieces)
        ends = list(accumulate([record.length + 1 for record in records], initial=begin))[1:]
        place = 0
        while held - place >= step + overlap:
            number = bisect_right(ends, place)
            until = bisect_right(ends, place + step + overlap - 1, number) + 1
            yield Stretch(
                letters[place : place + step + overlap],
                records[number:until],
                [end - place for end in ends[number:until]],
            )
            place += step
        number = bisect_right(ends, place)
        begin = (ends[number - 1] if number else begin) - place
        records = records[number:]
        pieces, held = [letters[place:]], held - place


def _endless(spec: StreamSpec, skip: int) -> Iterator[tuple[Chunk, int]]:
    """Shuffled epochs without end, from position ``skip`` of the records and their EOS on, in chunks.

    Yields (chunk, letters of its first record that are still to be skipped).
    """
    epoch, epoch_size = 0, 0
    while True:
        if epoch_size:  # every epoch has the same size, so whole ones are skipped by arithmetic
            epoch += skip // epoch_size
            skip %= epoch_size
        epoch_size = 0
        for chunk in shuffled_chunks(spec, epoch):
            size = len(chunk) + sum([record.length for record in chunk])
            epoch_size += size
            if skip >= size:
                skip -= size
                continue
            first = 0
            while skip >= chunk[first].length + 1:
                skip -= chunk[first].length + 1
                first += 1
            yield chunk[first:], skip
            skip = 0
        epoch += 1
