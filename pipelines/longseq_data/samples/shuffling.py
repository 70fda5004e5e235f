"""The order of streamed documents: files in turn, a split of them, a shuffle buffer.

Documents move in chunks, and the draws of a chunk are made at once, because a step of Python for each document costs
more than reading it. The order does not depend on the chunks, nor on when the blocks come that they are cut from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longseq_data.errors import DataError
from longseq_data.ingest.follow import Road
from longseq_data.ingest.ring import Job, Reader
from longseq_data.randomness import generator
from longseq_data.readers.documents import Document
from longseq_data.readers.formats import Leaf
from longseq_data.splits import Identifiers

from .chunks import Chunk, Integers
from .permuting import RecordsOf, documents_of, permuted, tokens_of
from .stream_settings import StreamSettings

OPEN_SOURCES = 16  # read in turn while shuffling
CHUNK_TOKENS = 1 << 18  # of a block, at a time: they are held several times on their way
BUFFER_RESIDUES = 1 << 26  # bytes: a shuffle buffer of whole proteomes must still fit in a worker's memory


def road(spec: StreamSettings, leaves: list[Leaf], epoch: int | None = None) -> Road:
    """Where the blocks of a stream's leaves come from. epoch: of a training, which reads all of them once."""
    folder, ring = Path(spec.cache) if spec.cache else None, None
    if spec.ring is not None and epoch is not None and folder is None and spec.reading.tokens != "pixels":
        place = spec.ring.folder(spec.seed, spec.sources)
        ring = Reader(Job(tuple(leaves), spec.reading, spec.strict, place, spec.ring.bytes), epoch)
    return Road(spec.reading, leaves, spec.strict, folder, spec.tell, ring)


def leaves_of(spec: StreamSettings, epoch: int) -> list[Leaf]:
    """What the sources consist of, in the order of an epoch."""
    files = spec.reading.leaves(spec.sources)
    priorities = generator(spec.seed, "sources", epoch).random(len(files))
    return [files[i] for i in np.argsort(priorities, kind="stable")]


def documents_in_file_order(spec: StreamSettings, hollow: bool = False) -> Iterator[Document]:
    """The documents of the split. Raises DataError for bad data, and where there is none.

    hollow: proteins without residues too, which no training and no evaluation looks at.
    """
    files = spec.reading.leaves(spec.sources)
    blocks = road(spec, files)
    chunks = chain.from_iterable(_chunks(spec, leaf, blocks, documents_of, hollow) for leaf in files)
    return _one_by_one(_of_split(spec, chunks))


def shuffled_documents(spec: StreamSettings, epoch: int) -> Iterator[Document]:
    """The documents of one epoch: files in a random order, several of them in turn, through a shuffle buffer."""
    return _one_by_one(shuffled(spec, epoch, records_of=documents_of))


def shuffled(spec: StreamSettings, epoch: int, records_of: RecordsOf = tokens_of) -> Iterator[Chunk]:
    """The same in chunks, and of each record nothing but its tokens, or what ``records_of`` gives."""
    if epoch and spec.later_epochs == "permutation" and spec.shuffle_buffer > 1:
        files = spec.reading.leaves(spec.sources)
        yield from _of_split(spec, permuted(spec, epoch, files, road(spec, files), records_of))
        return
    files = leaves_of(spec, epoch)
    blocks = road(spec, files, epoch)
    waiting = (_chunks(spec, leaf, blocks, records_of) for leaf in files)
    with closing(_in_turn(waiting, OPEN_SOURCES if spec.shuffle_buffer > 1 else 1)) as chunks:
        yield from _through_buffer(spec, epoch, _of_split(spec, chunks))


def endless(
    chunks: Callable[[int], Iterator[Chunk]], skip: int, positions: Callable[[Chunk], Integers]
) -> Iterator[tuple[Chunk, int]]:
    """Epochs without end, from position ``skip`` on, in chunks; each record takes its number of positions.

    chunks: the records of one epoch.

    Yields (chunk, positions of its first record that are still to be skipped).
    """
    epoch, epoch_size = 0, 0
    while True:
        if epoch_size:  # every epoch has the same size, so whole ones are skipped by arithmetic
            epoch += skip // epoch_size
            skip %= epoch_size
        epoch_size = 0
        for chunk in chunks(epoch):
            ends = np.cumsum(positions(chunk))
            size = int(ends[-1])
            epoch_size += size
            if skip >= size:
                skip -= size
                continue
            first = int(np.searchsorted(ends, skip, "right"))
            yield chunk[first:], skip - (int(ends[first - 1]) if first else 0)
            skip = 0
        epoch += 1


def _one_by_one(chunks: Iterator[Chunk]) -> Iterator[Document]:
    for chunk in chunks:
        yield from chunk.items.tolist()


def _chunks(
    spec: StreamSettings, leaf: Leaf, road: Road, records_of: RecordsOf, hollow: bool = False
) -> Generator[Chunk, None, None]:
    with closing(road.blocks(leaf)) as blocks:
        for block in blocks:
            there = np.arange(len(block)) if hollow else np.flatnonzero(block.lengths)
            if spec.whole:
                wanted = np.ones(len(there), dtype=bool)
            else:
                wanted = spec.rule.chosen(spec.split or "", block.places(spec.rule.by)[there])
            step = max(1, CHUNK_TOKENS * len(block) // max(1, int(block.offsets[-1])))
            for first in range(0, len(there), step):
                here, chosen = there[first : first + step], wanted[first : first + step]
                rows = here[chosen].tolist()
                items = np.empty(len(here), dtype=object)
                items[chosen] = np.fromiter(records_of(spec, leaf.source, block, rows), object, len(rows))
                yield Chunk(items, block.held[here])


def _of_split(spec: StreamSettings, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    seen = kept = 0
    for chunk in chunks:
        chosen = chunk if spec.whole else chunk[chunk.items != None]  # noqa: E711 - of each entry
        seen += len(chunk)
        kept += len(chosen)
        if len(chosen):
            yield chosen
    if not kept:
        raise DataError(_empty_split(spec, seen))


def _empty_split(spec: StreamSettings, seen: int) -> str:
    named = ", ".join(spec.sources[:3]) or "no file at all"
    if len(spec.sources) > 3:
        named += f" and {len(spec.sources) - 3} more ({len(spec.sources)} in all)"
    change = {
        "train": "lower data.valid_fraction or data.test_fraction",
        "valid": "raise data.valid_fraction, switch validation off (trainer.valid_every=0)",
        "test": "raise data.test_fraction",
        None: "name files",
    }[spec.split]
    said = (
        f"The {spec.split or 'whole'} split of {named} is empty: none of {seen} records falls into it with "
        f"data.valid_fraction={spec.valid_fraction} and data.test_fraction={spec.test_fraction}; {change}, or give "
        f"more records."
    )
    if spec.split is None or not seen:
        return said
    found = Identifiers()
    whole = replace(spec, split=None)
    for document in documents_in_file_order(whole):
        residues = spec.encoder.encode(document).astype(np.uint8)
        found.add(document.identifier, spec.rule, residues.tobytes)
    others = "data.valid and data.test" if spec.split == "train" else f"data.{spec.split}"
    shares = spec.valid_fraction, spec.test_fraction
    fixed = spec.split == "test"  # which a trained model is scored on
    reason = found.lost(spec.split, *shares, otherwise=f"name files in {others}", fixed=fixed)  # type: ignore[arg-type]
    return f"{said} In detail: {reason}." if found.repeated or found.records == 1 else said


class _Turns:
    """An open source, and what has been read of it."""

    def __init__(self, chunks: Generator[Chunk, None, None]) -> None:
        self.chunks = chunks
        self.held = Chunk.of([], [])
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


def _in_turn(waiting: Iterator[Generator[Chunk, None, None]], count: int) -> Generator[Chunk, None, None]:
    """One document of each of ``count`` files in turn; where one ends, the next in line takes its turns.

    So large files mix from the start, whatever the size of the shuffle buffer; small ones end before they do.
    """
    opened = map(_Turns, waiting)
    turns = deque(islice(opened, count))
    try:
        while turns:
            rounds = min(source.left() for source in turns)
            if rounds and len(turns) == 1:
                yield turns[0].take(rounds)
            elif rounds:
                yield _interleaved([source.take(rounds) for source in turns])
            else:  # a round in which sources end
                single: list[Chunk] = []
                for _ in range(len(turns)):
                    source = turns.popleft()
                    if source.left():
                        single.append(source.take(1))
                        turns.append(source)
                    else:
                        turns.extend(islice(opened, 1))
                if single:
                    yield Chunk.joined(single)
    finally:
        for source in turns:
            source.chunks.close()  # and with it the file


def _interleaved(parts: list[Chunk]) -> Chunk:
    """The first of each, the second of each, ..., of chunks of one size."""
    return Chunk(
        np.stack([part.items for part in parts], axis=1).ravel(), np.stack([part.sizes for part in parts], 1).ravel()
    )


def _through_buffer(spec: StreamSettings, epoch: int, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Every document takes the place of one drawn from a buffer of ``shuffle_buffer``, or leaves at once."""
    if spec.shuffle_buffer == 1:
        yield from chunks
        return
    buffer = _Buffer(spec.shuffle_buffer, generator(spec.seed, "shuffle", epoch))
    for chunk in chunks:
        out = buffer.exchange(chunk)
        if len(out):
            yield out
    yield from buffer.drain()


class _Buffer:
    """Up to ``most`` documents of up to BUFFER_RESIDUES bytes."""

    def __init__(self, most: int, random: np.random.Generator) -> None:
        self._most = most
        self._held = 0  # bytes
        self._count = 0
        self._places = Chunk.of([None] * 1024, [0] * 1024)  # the first ``_count`` are in use
        self._random = random
        self._drawn = random.random(0)

    def exchange(self, chunk: Chunk) -> Chunk:
        """Put documents in, one after another; gives those that had to leave."""
        self._reserve(self._count + len(chunk))
        size = int(chunk.sizes.sum())
        if self._held + size > BUFFER_RESIDUES:  # perhaps too much on the way
            return self._step_by_step(chunk)
        free = min(self._most - self._count, len(chunk))
        self._places.put(slice(self._count, self._count + free), chunk[:free])
        self._count += free
        after = chunk[free:]
        out = self._replaced(after) if len(after) else after
        self._held += size - int(out.sizes.sum())
        return out

    def _replaced(self, chunk: Chunk) -> Chunk:
        """Of a full buffer: each document makes one too many, and one of all leaves, perhaps itself."""
        slots = (self._draw(len(chunk)) * (self._most + 1)).astype(np.int64)
        small = slots.astype(np.uint16) if self._most < 1 << 16 else slots  # which are sorted in linear time
        order = np.argsort(small, kind="stable")
        same = slots[order[1:]] == slots[order[:-1]]  # as the one before in ``order``
        out = self._places[np.minimum(slots, self._most - 1)]
        out.put(order[1:][same], chunk[order[:-1][same]])  # what an earlier one of this chunk has put there
        itself = slots == self._most
        out.put(itself, chunk[itself])
        last = order[np.append(~same, True)]
        last = last[~itself[last]]
        self._places.put(slots[last], chunk[last])
        return out

    def _step_by_step(self, chunk: Chunk) -> Chunk:
        items, sizes = self._places.items, self._places.sizes
        left: list[object] = []
        left_sizes: list[int] = []
        for item, size in zip(chunk.items.tolist(), chunk.sizes.tolist(), strict=True):
            items[self._count], sizes[self._count] = item, size
            self._count += 1
            self._held += size
            while self._count > self._most or (self._held > BUFFER_RESIDUES and self._count > 1):
                place = int(self._draw(1)[0] * self._count)
                left.append(items[place])
                left_sizes.append(int(sizes[place]))
                self._count -= 1
                self._held -= left_sizes[-1]
                items[place], sizes[place] = items[self._count], sizes[self._count]
                items[self._count] = None
        return Chunk.of(left, left_sizes)

    def drain(self) -> Iterator[Chunk]:
        """The rest, in a random order."""
        places = list(range(self._count))
        while places:
            count = min(1024, len(places))
            drawn = (self._draw(count) * np.arange(len(places), len(places) - count, -1)).astype(np.int64)
            out = []
            for i in drawn.tolist():
                out.append(places[i])
                places[i] = places[-1]
                places.pop()
            yield self._places[np.array(out)]

    def _draw(self, count: int) -> npt.NDArray[np.float64]:
        """The next of what ``random.random()`` gives again and again."""
        if len(self._drawn) < count:
            self._drawn = np.concatenate([self._drawn, self._random.random(max(1024, count))])
        drawn, self._drawn = self._drawn[:count], self._drawn[count:]
        return drawn

    def _reserve(self, count: int) -> None:
        count = min(count, self._most + 1)
        while count > len(self._places):
            more = len(self._places)
            self._places = Chunk.joined([self._places, Chunk.of([None] * more, [0] * more)])
