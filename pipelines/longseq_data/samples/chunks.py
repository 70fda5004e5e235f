"""Documents in chunks: a step of Python for each of them costs more than reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some documents, in the order in which they come."""

    items: npt.NDArray[np.object_]  # Document; None: of another split. Of ``shuffled_tokens``: bytes
    sizes: Integers  # what they count for in a buffer: bytes of memory, about

    @classmethod
    def of(cls, items: Sequence[object], sizes: Sequence[int]) -> Chunk:
        return cls(np.fromiter(items, object, len(items)), np.array(sizes, dtype=np.int64))

    @classmethod
    def joined(cls, chunks: Sequence[Chunk]) -> Chunk:
        return cls(np.concatenate([chunk.items for chunk in chunks]), np.concatenate([chunk.sizes for chunk in chunks]))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, which: slice | npt.NDArray[Any]) -> Chunk:
        return Chunk(self.items[which], self.sizes[which])

    def put(self, where: slice | npt.NDArray[Any], chunk: Chunk) -> None:
        self.items[where], self.sizes[where] = chunk.items, chunk.sizes
