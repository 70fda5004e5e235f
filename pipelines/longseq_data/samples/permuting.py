"""Epochs after the first: a permutation of all records, of blocks that are all there by then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .chunks import Chunk
from .order import permutation

if TYPE_CHECKING:
    from longseq_data.ingest.follow import Road
    from longseq_data.readers.formats import Leaf

    from .streaming import StreamSpec

CHUNK = 4096  # records at a time


def permuted(spec: StreamSpec, epoch: int, files: list[Leaf], road: Road, bulk: bool) -> Iterator[Chunk]:
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
            documents = block.ids(chosen) if bulk else [block.document(row, source, spec.vocabulary) for row in chosen]
            items[here[wanted]] = documents
        yield Chunk(items[full], held[full])
