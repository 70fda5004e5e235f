"""Embeddings as work in shards. No torch here: who deals it out to processes starts without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from io import BufferedReader
from typing import IO, TYPE_CHECKING

import numpy as np

from longseq.evaluation.records import Record, batches, records
from longseq.evaluation.shards import Work
from longseq.evaluation.vector_options import Embedded, Wanted

if TYPE_CHECKING:
    from longseq.models.performer import PerformerLM


class Vectors(Work[list[Record], Embedded]):
    """Embeddings. Options: the fields of hidden_vectors.Wanted."""

    @cached_property
    def wanted(self) -> Wanted:
        return Wanted(**{**self.job.options, "layers": tuple(self.job.options["layers"])})

    @cached_property
    def model(self) -> PerformerLM:
        return self.source.load(tuned=True)

    def groups(self) -> Iterator[list[Record]]:
        return batches(records(self.source, self.job.file), lambda record: len(record.row))

    def rows(self, group: list[Record]) -> list[Embedded]:
        from longseq.evaluation.hidden_vectors import of_batch

        return of_batch(self.model, self.source.vocabulary, group, self.wanted)

    def write(self, file: IO[bytes], rows: list[Embedded]) -> None:
        np.save(file, np.array([row.identifier.encode().hex() for row in rows]))  # names may end in what NumPy cuts off
        np.save(file, np.array([row.length for row in rows]))
        np.save(file, np.stack([row.pooled for row in rows]))
        for row in rows:
            if row.residues is not None:
                np.save(file, row.residues)

    def read(self, file: BufferedReader) -> Iterator[Embedded]:
        while file.peek(1):
            names, lengths, pooled = (np.load(file) for _ in range(3))
            for name, length, vector in zip(names.tolist(), lengths.tolist(), pooled, strict=True):
                residues = np.load(file) if self.wanted.per_residue else None
                yield Embedded(bytes.fromhex(name).decode(), length, vector, residues, self.wanted.pool)
