"""The order of streamed documents: files in turn, a split of them, a shuffle buffer.

Documents move in chunks, as their readers give them, because a step of a generator for each costs more than reading it.
The order does not depend on the chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from .documents import Document
from .errors import DataError
from .fasta_blocks import read_chunks
from .formats import Leaf
from .randomness import generator
from .splits import split_of

if TYPE_CHECKING:
    from .streaming import StreamSpec

OPEN_SOURCES = 16  # read in turn while shuffling
BUFFER_RESIDUES = 1 << 26  # bytes: a shuffle buffer of whole proteomes must still fit in a worker's memory

Chunk = Sequence[Document]


def chunks_in_file_order(spec: StreamSpec) -> Iterator[Chunk]:
    """The documents of the split. Raises DataError for bad data, and where there is none."""
    files = spec.reading.leaves(spec.sources)
    return _of_split(spec, chain.from_iterable(_chunks(spec, leaf) for leaf in files))


def shuffled_chunks(spec: StreamSpec, epoch: int) -> Iterator[Chunk]:
    """The documents of one epoch: files in a random order, several of them in turn, through a shuffle buffer."""
    files = spec.reading.leaves(spec.sources)
    priorities = generator(spec.seed, "sources", epoch).random(len(files))
    with closing(_in_turn(spec, [files[i] for i in np.argsort(priorities, kind="stable")])) as chunks:
        yield from _through_buffer(spec, epoch, _of_split(spec, chunks))


def _chunks(spec: StreamSpec, leaf: Leaf) -> Generator[Chunk, None, None]:
    if leaf.format == "fasta":
        yield from read_chunks(leaf.source)
        return
    for document in spec.reading.documents(leaf, strict=spec.strict, measured=spec.measured):
        yield (document,)


def _of_split(spec: StreamSpec, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    seen = kept = 0
    valid, test, split = spec.valid_fraction, spec.test_fraction, spec.split
    everything = split is None or (split == "train" and not valid and not test)
    for chunk in chunks:
        chosen = chunk if everything else [each for each in chunk if split_of(each.identifier, valid, test) == split]
        seen += len(chunk)
        kept += len(chosen)
        if chosen:
            yield chosen
    if not kept:
        raise DataError(_empty_split(spec, seen))


def _empty_split(spec: StreamSpec, seen: int) -> str:
    named = ", ".join(spec.sources[:3]) or "no file at all"
    if len(spec.sources) > 3:
        named += f" and {len(spec.sources) - 3} more ({len(spec.sources)} in all)"
    change = {
        "train": "lower data.valid_fraction or data.test_fraction",
        "valid": "raise data.valid_fraction, switch validation off (trainer.valid_every=0)",
        "test": "raise data.test_fraction",
        None: "name files",
    }[spec.split]
    return (
        f"The {spec.split or 'whole'} split of {named} is empty: none of {seen} records falls into it with "
        f"data.valid_fraction={spec.valid_fraction} and data.test_fraction={spec.test_fraction}; {change}, or give "
        f"more records."
    )


class _Turns:
    """An open source, and what has been read of it."""

    def __init__(self, chunks: Generator[Chunk, None, None]) -> None:
        self.chunks = chunks
        self.held: Chunk = ()
        self.taken = 0

    def left(self) -> int:
        """Documents that can be taken now; 0: there are no more."""
        while self.taken == len(self.held):
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.held, self.taken = chunk, 0
        return len(self.held) - self.taken

    def take(self, count: int) -> Chunk:
        self.taken += count
        return self.held[self.taken - count : self.taken]


def _in_turn(spec: StreamSpec, files: Sequence[Leaf]) -> Generator[Chunk, None, None]:
    """One document of each of OPEN_SOURCES files in turn; where one ends, the next in line takes its turns.

    So large files mix from the start, whatever the size of the shuffle buffer; small ones end before they do.
    """
    waiting = (_Turns(_chunks(spec, leaf)) for leaf in files)
    turns = deque(islice(waiting, OPEN_SOURCES))
    try:
        while turns:
            rounds = min(source.left() for source in turns)
            if rounds and len(turns) == 1:
                yield turns[0].take(rounds)
            elif rounds:
                yield list(chain.from_iterable(zip(*(source.take(rounds) for source in turns), strict=True)))
            else:  # a round in which sources end
                chunk: list[Document] = []
                for _ in range(len(turns)):
                    source = turns.popleft()
                    if source.left():
                        chunk += source.take(1)
                        turns.append(source)
                    else:
                        turns.extend(islice(waiting, 1))
                if chunk:
                    yield chunk
    finally:
        for source in turns:
            source.chunks.close()  # and with it the file


def _through_buffer(spec: StreamSpec, epoch: int, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    draws = _draws(generator(spec.seed, "shuffle", epoch))
    buffer: list[Document] = []
    held, most = 0, spec.shuffle_buffer
    for chunk in chunks:
        out: list[Document] = []
        for document in chunk:
            buffer.append(document)
            held += document.held
            while len(buffer) > most or (held > BUFFER_RESIDUES and len(buffer) > 1):
                i = int(next(draws) * len(buffer))
                chosen, buffer[i] = buffer[i], buffer[-1]
                buffer.pop()
                held -= chosen.held
                out.append(chosen)
        if out:
            yield out
    while buffer:
        out = []
        for _ in range(min(1024, len(buffer))):
            i = int(next(draws) * len(buffer))
            chosen, buffer[i] = buffer[i], buffer[-1]
            buffer.pop()
            out.append(chosen)
        yield out


def _draws(random: np.random.Generator) -> Iterator[float]:
    """What ``random.random()`` gives again and again, a block at a time."""
    while True:
        yield from random.random(1024).tolist()
