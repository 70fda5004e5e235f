"""The records of a file as a model reads them. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from longseq.errors import LongseqError
from longseq.evaluation.request import samples_of
from longseq.trained_model import Source
from longseq_data.errors import DataError
from longseq_data.ingest.survey import survey
from longseq_data.samples.packing import Window, document
from longseq_data.samples.shuffling import documents_in_file_order
from longseq_data.samples.streaming import StreamSpec
from longseq_data.tokenization import ids_of
from longseq_data.vocabulary import Tokens, Vocabulary

DIRECTIONS = ("forward", "both")
BATCH_TOKENS = 4096  # read by a model at once, padding included; a longer record is read alone

Item = TypeVar("Item")


class Record(NamedTuple):
    identifier: str
    row: Tokens  # the token before a record, its ordinary tokens, EOS

    @property
    def length(self) -> int:
        return len(self.row) - 2

    @property
    def ordinary(self) -> Tokens:
        return self.row[1:-1]


def both_directions(source: Source, direction: str | None, context: object = None) -> bool:
    """Whether log-likelihoods are the mean of those of a record and of its residues from the last to the first.

    Args:
        direction: forward or both; None: both of a causal model that was trained on both (data.reverse), but for what
            is read behind a context.

    Raises:
        LongseqError: for anything else, a masked model that is asked for both, and both behind a context.
    """
    if direction not in (None, *DIRECTIONS):
        raise LongseqError(f"direction={direction}: take {' or '.join(DIRECTIONS)}.")
    if direction is None:
        return source.causal and source.config.data.reverse > 0 and context is None
    if direction == "forward":
        return False
    source.require("causal", "it reads both sides in any case: leave direction out.")
    if context is not None:
        raise LongseqError("direction=both: what is read behind a context is read forward; leave one of them out.")
    if source.vocabulary.name != "protein":
        raise LongseqError(f"{source.folder}: a model of {source.vocabulary.name}; directions are about proteins.")
    return True


def records(source: Source, file: str) -> Iterator[Record]:
    """Every record of a file, in its order; letters outside the alphabet are read as X.

    Raises:
        DataError, LongseqError: for what cannot be read as the model's tokens.
    """
    samples = _samples(source, file)
    encoder = samples.encoder
    for each in documents_in_file_order(samples, hollow=True):
        row = Window((document(each),)).tokens(encoder)  # BOS, its tokens, EOS
        row[0] = source.begins
        yield Record(each.identifier, row)


def record_of(source: Source, identifier: str, sequence: str, what: str) -> Record:
    """A record from its letters, as one of a file would be read.

    Raises:
        LongseqError: for a letter that is no residue; ``what`` says whose.
    """
    body = prompt_tokens(sequence, source.vocabulary, what)
    return Record(identifier, np.array([source.begins, *body, source.vocabulary.eos], dtype=source.vocabulary.dtype))


def look(source: Source, file: str) -> None:
    """Say what a file holds, and which of its letters are read as X. Raises as ``records`` does."""
    from longseq.data_report import say

    samples = _samples(source, file)
    say(file, survey(samples.reading, samples.sources, strict=samples.strict))
    sys.stderr.flush()


def batches(items: Iterable[Item], length: Callable[[Item], int], limit: int = BATCH_TOKENS) -> Iterator[list[Item]]:
    """Items in their order, as many at a time as fit into ``limit`` tokens when padded to the longest."""
    held: list[Item] = []
    longest = 0
    for item in items:
        size = length(item)
        if held and (len(held) + 1) * max(longest, size) > limit:
            yield held
            held, longest = [], 0
        held.append(item)
        longest = max(longest, size)
    if held:
        yield held


def prompt_tokens(text: str, vocabulary: Vocabulary, what: str) -> list[int]:
    """A prompt as ids.

    Raises:
        LongseqError: for a letter that is no residue, naming it and its position; and for what is no text.
    """
    try:
        return ids_of(text, vocabulary.name, what)
    except DataError as error:
        raise LongseqError(str(error)) from None


def _samples(source: Source, file: str) -> StreamSpec:
    samples = samples_of(source, file)
    if not isinstance(samples, StreamSpec):
        raise LongseqError(f"{file}: a prepared corpus; give the files that it was made of, FASTA or text.")
    if source.vocabulary.name == "pixels":
        raise LongseqError(f"{source.folder}: a model of pixels; this works on proteins and text.")
    return samples
