"""Samples of streamed files one by one, in plain Python: what the batches are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longseq_data.randomness import uniforms
from longseq_data.readers.documents import Document, DocumentEncoder, Extent
from longseq_data.samples.chunks import Chunk
from longseq_data.samples.masking import mask_tokens
from longseq_data.samples.packing import Piece, Window, crop, cut, document
from longseq_data.samples.permuting import documents_of
from longseq_data.samples.rows import Arrays
from longseq_data.samples.shuffling import endless, shuffled
from longseq_data.samples.streaming import StreamSpec, evaluation_windows
from longseq_data.vocabulary import BOS, EOS, IGNORE, PROTEIN, Tokens, Vocabulary, reverse_complement


class Sample(NamedTuple):
    """``tokens`` and ``targets`` have the same length; a target is IGNORE where nothing is scored."""

    tokens: Tokens
    targets: npt.NDArray[np.signedinteger]
    segments: npt.NDArray[np.int32] | None = None  # of a spec with reset: the document of each token, from 0
    extent: Extent | None = None  # of a measured spec: what the scored tokens stand for


def sample_of(spec: StreamSpec, window: Window, index: int, encoder: DocumentEncoder, training: bool = False) -> Sample:
    """Tokenise a window; ``index`` is its number in the stream, which decides its mask and, in training, strand."""
    tokens = window.tokens(encoder)
    if training and spec.reverse_complement and float(uniforms(spec.seed, "strand", index)) < 0.5:
        tokens = reverse_complement(tokens)
    segments = window.segments() if spec.reset else None
    if training and spec.reverse and float(uniforms(spec.seed, "reverse", index)) < spec.reverse:
        tokens = from_last_to_first(spec, tokens)
        segments = None if segments is None else segments[-1] - segments[::-1]
    extent = window.measure(encoder, spec.overlap) if spec.measured else None
    if spec.objective == "masked":
        return Sample(*mask_tokens(tokens, spec.seed, index, spec.vocabulary), segments, extent)
    targets = tokens[1:].astype(spec.vocabulary.target_dtype)
    if segments is not None:
        targets[segments[1:] != segments[:-1]] = IGNORE  # no document tells how the next one begins
        segments = segments[:-1]
    return Sample(tokens[:-1], targets, segments, extent)


def from_last_to_first(spec: StreamSpec, tokens: Tokens) -> Tokens:
    """Token by token: what stands before a record stands behind it now, as that what stands there."""
    before = EOS if spec.packing == "concat" and not spec.reset else BOS
    swapped = {BOS: EOS, EOS: before}
    return np.array([swapped.get(token, token) for token in reversed(tokens.tolist())], dtype=tokens.dtype)


def training_samples(spec: StreamSpec, start: int = 0) -> Iterator[Sample]:
    """The endless stream of training samples, from sample number ``start`` on: the plain-Python way to iterate.

    Raises DataError for bad data, and for a split without records.
    """
    encoder = spec.encoder
    for index, window in enumerate(training_windows(spec, start), start):
        yield sample_of(spec, window, index, encoder, training=True)


def training_windows(spec: StreamSpec, start: int = 0) -> Iterator[Window]:
    """The windows of training_samples, not yet tokenised; number ``start`` comes first.

    Windows before ``start`` cost reading the blocks' lengths, and whole epochs nothing beyond the first one.
    """
    if spec.packing == "concat":
        joined = _documents_joined if spec.reset else _joined
        yield from cut(joined(spec, start * spec.length), spec.length + spec.overlap, spec.overlap)
        return
    size = spec.length + spec.overlap
    for index, (record, _) in enumerate(_endless(spec, start, lambda record: 1), start):
        whole = document(record)
        cropped = whole.stop > size and spec.crop == "random"
        where = float(uniforms(spec.seed, "crop", index)) if cropped else 0.0
        yield crop(whole, size, where)


def evaluation_samples(spec: StreamSpec, max_samples: int | None = None) -> Iterator[Sample]:
    """The samples of one evaluation pass, at most ``max_samples`` of them: the plain-Python way to iterate.

    Which ones, and in which order, is said at evaluation_windows.
    """
    encoder = spec.encoder
    for index, window in enumerate(evaluation_windows(spec, max_samples)):
        yield sample_of(spec, window, index, encoder)


def _endless(spec: StreamSpec, skip: int, size: Callable[[Document], int]) -> Iterator[tuple[Document, int]]:
    """Shuffled epochs without end, from position ``skip`` on, where a record takes ``size(record)`` positions.

    Yields (record, positions of it that are still to be skipped): the second is 0 but for the first record.
    """

    def positions(chunk: Chunk) -> npt.NDArray[np.int64]:
        return np.array([size(record) for record in chunk.items.tolist()], dtype=np.int64)

    for chunk, rest in endless(partial(shuffled, spec, records_of=documents_of), skip, positions):
        for record in chunk.items.tolist():
            yield record, rest
            rest = 0


def _joined(spec: StreamSpec, skip: int) -> Iterator[Piece]:
    """The stream BOS, residues EOS, residues EOS, ... from token ``skip`` on."""
    first = 0 if skip == 0 else 1
    for record, rest in _endless(spec, max(skip - 1, 0), lambda record: record.length + record.closed):
        yield Piece(record, first + rest, document(record).stop)
        first = 1


def _documents_joined(spec: StreamSpec, skip: int) -> Iterator[Piece]:
    """The stream BOS residues EOS, BOS residues EOS, ... from token ``skip`` on."""
    for record, rest in _endless(spec, skip, lambda record: document(record).stop):
        yield document(record)._replace(start=rest)


def collate(samples: Sequence[Sample], rows: int, vocabulary: Vocabulary = PROTEIN) -> Arrays:
    """ "tokens" and "targets", and "segments" where samples have them, (rows, longest sample).

    Padded with the vocabulary's pad, IGNORE and -1. Rows beyond the samples are filler; without any sample they are one
    token long.
    """
    length = max((len(sample.tokens) for sample in samples), default=1)
    batch = filler(rows, length, vocabulary, segments=any(sample.segments is not None for sample in samples))
    for row, sample in enumerate(samples):
        for name, into in batch.items():
            values = getattr(sample, name)
            into[row, : len(values)] = values
    return batch


def filler(rows: int, length: int, vocabulary: Vocabulary, segments: bool) -> Arrays:
    """A batch without samples."""
    fill = {"tokens": vocabulary.pad, "targets": IGNORE, **({"segments": -1} if segments else {})}
    dtypes = {"segments": np.dtype(np.int32)}
    return {
        name: np.full((rows, length), value, dtype=dtypes.get(name, vocabulary.target_dtype))
        for name, value in fill.items()
    }
