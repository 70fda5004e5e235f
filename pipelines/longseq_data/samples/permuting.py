"""Epochs after the first: a permutation of all records, of blocks that are all there by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from longseq_data.ingest.block import Block, BlockDocument
from longseq_data.ingest.follow import Road
from longseq_data.readers.formats import Leaf

from .chunks import Chunk
from .order import permutation
from .stream_settings import StreamSettings

CHUNK = 4096  # records at a time


# What is taken of some rows of a source's block.
RecordsOf = Callable[[StreamSettings, str, Block, list[int]], list[Any]]


def tokens_of(spec: StreamSettings, source: str, block: Block, rows: list[int]) -> list[Any]:
    """Of each a sequence of tokens that ``bytes.join`` takes; those of pictures stay where they are mapped."""
    if block.dtype.itemsize == 1 and spec.vocabulary.closed:
        return block.ids(rows)
    return [memoryview(block.view(row)) for row in rows]  # type: ignore[arg-type]


def documents_of(spec: StreamSettings, source: str, block: Block, rows: list[int]) -> list[BlockDocument]:
    return [block.document(row, source, spec.vocabulary) for row in rows]


def permuted(spec: StreamSettings, epoch: int, files: list[Leaf], road: Road, records_of: RecordsOf) -> Iterator[Chunk]:
    """The records of an epoch in chunks, those of other splits as None. Raises DataError where there is no cache.

    The permutation is one of the records of all splits, of which those of the split are taken: no table is needed.
    """
    blocks = [(leaf.source, block) for leaf in files for block in road.kept(leaf)]
    ends = np.cumsum([len(block) for _, block in blocks])
    total = int(ends[-1])
    order = permutation(total, spec.seed, epoch)
    for first in range(0, total, CHUNK):
        records = order(np.arange(first, min(first + CHUNK, total)))
        numbers = np.searchsorted(ends, records, "right")
        by_block = np.argsort(numbers, kind="stable")
        borders = np.flatnonzero(np.diff(numbers[by_block])) + 1
        items, held = np.empty(len(records), dtype=object), np.zeros(len(records), dtype=np.int64)
        full = np.zeros(len(records), dtype=bool)
        for here in np.split(by_block, borders):
            source, block = blocks[int(numbers[here[0]])]
            rows = records[here] - (int(ends[numbers[here[0]]]) - len(block))
            held[here] = block.held[rows]
            full[here] = block.offsets[rows + 1] > block.offsets[rows]
            wanted = full[here]
            if not spec.whole:
                wanted = wanted & spec.rule.chosen(spec.split or "", block.places(spec.rule.by)[rows])
            chosen = rows[wanted].tolist()
            # fromiter: of a list NumPy would make one array of numbers
            items[here[wanted]] = np.fromiter(records_of(spec, source, block, chosen), object, len(chosen))
        yield Chunk(items[full], held[full])
