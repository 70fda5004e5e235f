"""Joined proteins in bulk: the stream of packing "concat" as ids in one piece, of which windows are views.

The same samples as streaming.training_windows and StreamSpec.sample give one by one, many times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from longseq_data.readers.fasta_blocks import EOS_BYTE
from longseq_data.vocabulary import BOS, RESIDUES

from .masking import mask_rows, masked_counts
from .sharing import Arrays, MakeBatch, Share
from .shuffling import endless, shuffled_tokens

if TYPE_CHECKING:
    from .streaming import StreamSpec

Ids = npt.NDArray[np.uint8]


def training(spec: StreamSpec, start: int, share: Share) -> Iterator[MakeBatch]:
    """StreamSpec.training of proteins that are joined."""
    size = spec.length + spec.overlap
    rows = share.batch_sequences
    consumed = start
    for ids in _stretches(spec, start * spec.length, share.step_samples * spec.length, spec.overlap):
        windows = sliding_window_view(ids, size)[:: spec.length]
        mine = np.arange((share.rank - consumed) % share.world, share.step_samples, share.world)
        numbers = consumed + mine
        consumed += share.step_samples
        if spec.objective == "masked":
            marks = np.array([np.count_nonzero(windows[i] >= RESIDUES) for i in mine.tolist()])
            scored = int(masked_counts(size - marks).sum())
        else:
            scored = spec.length * len(mine)
        facts = {"step_targets": scored, "samples": consumed}
        for first in range(0, len(mine), rows):
            here = slice(first, first + rows)
            yield partial(_batch, spec, windows, mine[here], numbers[here], facts)


def _batch(
    spec: StreamSpec,
    windows: Ids,
    places: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    facts: dict[str, int],
) -> Arrays:
    tokens = windows[places]
    if spec.objective == "causal":
        batch: Arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}  # views of one array, none ignored
    else:
        inputs, targets = mask_rows(tokens, spec.seed, numbers)
        batch = {"tokens": inputs, "targets": targets}
    return {**batch, **{name: np.array(value, dtype=np.int64) for name, value in facts.items()}}


def _stretches(spec: StreamSpec, skip: int, step: int, overlap: int) -> Iterator[Ids]:
    """The stream from token ``skip`` on, ``step`` tokens at a time and ``overlap`` of the next."""
    pieces = [] if skip else [bytes([BOS])]
    held = len(pieces)  # ids in pieces
    for chunk, rest in endless(partial(shuffled_tokens, spec), max(skip - 1, 0), lambda chunk: chunk.sizes + 1):
        joined = EOS_BYTE.join(chunk.items.tolist()) + EOS_BYTE
        pieces.append(joined[rest:] if rest else joined)
        held += len(joined) - rest
        if held < step + overlap:
            continue
        text, place = b"".join(pieces), 0
        ids = np.frombuffer(text, dtype=np.uint8)
        while held - place >= step + overlap:
            yield ids[place : place + step + overlap]
            place += step
        pieces, held = [text[place:]], held - place
