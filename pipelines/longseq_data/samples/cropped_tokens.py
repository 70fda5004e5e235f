"""Cropped proteins in bulk: packing "crop", a batch at a time.

The same samples as streaming.training_windows and StreamSpec.sample give one by one, many times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import uniforms
from longseq_data.readers.fasta_blocks import EOS_BYTE
from longseq_data.vocabulary import BOS, IGNORE, PAD, PROTEIN

from .chunks import Chunk
from .corpus_cuts import residues_of
from .masking import mask_rows, masked_counts
from .sharing import Arrays, MakeBatch, Share, filler
from .shuffling import endless, shuffled_tokens

if TYPE_CHECKING:
    from .streaming import StreamSpec

Integers = npt.NDArray[np.int64]
BOS_BYTE, PAD_BYTE = bytes([BOS]), bytes([PAD])


def training(spec: StreamSpec, start: int, share: Share) -> Iterator[MakeBatch]:
    """StreamSpec.training of proteins that are cropped."""
    most = spec.length + spec.overlap
    rows = share.batch_sequences
    consumed = start
    for step in _steps(spec, start, share.step_samples):
        mine = np.arange((share.rank - consumed) % share.world, share.step_samples, share.world)
        numbers, lengths = consumed + mine, step.sizes[mine]
        consumed += share.step_samples
        slack = np.maximum(lengths + 2 - most, 0)  # with BOS and EOS
        if spec.crop == "random":
            starts = (uniforms(spec.seed, "crop", numbers) * (slack + 1)).astype(np.int64)
        else:
            starts = np.zeros_like(slack)
        sizes = np.minimum(lengths + 2 - starts, most)
        if spec.objective == "causal":
            scored = sizes - 1
        else:
            first, last = residues_of(starts, sizes, lengths)
            scored = masked_counts(last - first)
        facts = {"step_targets": int(scored.sum()), "samples": consumed}
        items = step.items[mine]
        for begin in range(0, len(mine), rows):
            here = slice(begin, begin + rows)
            yield partial(_batch, spec, Chunk(items[here], lengths[here]), starts[here], sizes[here],
                          numbers[here], rows, facts)  # fmt: skip


def _batch(
    spec: StreamSpec,
    records: Chunk,
    starts: Integers,
    sizes: Integers,
    numbers: Integers,
    rows: int,
    facts: dict[str, int],
) -> Arrays:
    first, last = residues_of(starts, sizes, records.sizes)
    begun, ended = starts == 0, starts + sizes == records.sizes + 2
    width = int(sizes.max())
    places = zip(records.items.tolist(), first.tolist(), last.tolist(), begun.tolist(), ended.tolist(), strict=True)
    text = b"".join(
        [
            (BOS_BYTE * bos + item[low:high] + EOS_BYTE * eos).ljust(width, PAD_BYTE)
            for item, low, high, bos, eos in places
        ]
    )
    tokens = np.frombuffer(text, dtype=np.uint8).reshape(len(records), width).astype(PROTEIN.target_dtype)
    if spec.objective == "causal":
        batch = shifted(tokens)
    else:
        inputs, targets = mask_rows(tokens, spec.seed, numbers)
        batch = {"tokens": inputs, "targets": targets}
    if len(records) < rows:
        rest = filler(rows - len(records), batch["tokens"].shape[1], PROTEIN, segments=False)
        batch = {name: np.concatenate([array, rest[name]]) for name, array in batch.items()}
    return {**batch, **{name: np.array(value, dtype=np.int64) for name, value in facts.items()}}


def shifted(tokens: npt.NDArray[np.int16]) -> Arrays:
    """Inputs and their next tokens, of rows that end in PAD; nothing is scored after their last token."""
    targets = np.where(tokens[:, 1:] == PAD, tokens.dtype.type(IGNORE), tokens[:, 1:])
    return {"tokens": np.where(targets < 0, tokens.dtype.type(PAD), tokens[:, :-1]), "targets": targets}


def _steps(spec: StreamSpec, skip: int, step: int) -> Iterator[Chunk]:
    """The records from number ``skip`` on, ``step`` at a time."""
    held: list[Chunk] = []
    count = 0
    for chunk, _ in endless(partial(shuffled_tokens, spec), skip, lambda chunk: np.ones_like(chunk.sizes)):
        held.append(chunk)
        count += len(chunk)
        if count < step:
            continue
        joined, place = Chunk.joined(held), 0
        while count - place >= step:
            yield joined[place : place + step]
            place += step
        held, count = [joined[place:]], count - place
