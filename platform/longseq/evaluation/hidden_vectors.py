"""A model's inner vectors of sequences, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longseq.errors import LongseqError
from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.evaluation.log_probabilities import refuse_what_is_not_finite
from longseq.evaluation.padded import on_device, padded
from longseq.evaluation.records import BATCH_TOKENS, Record, batches
from longseq.evaluation.vector_options import Embedded, Layer, Vectors, Wanted
from longseq.models.performer import PerformerLM
from longseq_data.vocabulary import Vocabulary


def vectors(
    model: PerformerLM, vocabulary: Vocabulary, records: Iterable[Record], wanted: Wanted
) -> Iterator[Embedded]:
    """Those of each record, in their order. Memory holds a batch, of longer records a tile and what is asked for."""
    for group in batches(records, lambda record: len(record.row)):
        yield from of_batch(model, vocabulary, group, wanted)


@torch.inference_mode()
def of_batch(model: PerformerLM, vocabulary: Vocabulary, group: Sequence[Record], wanted: Wanted) -> list[Embedded]:
    """The same of records that are read together, as :func:`longseq.evaluation.records.batches` puts them.

    Raises:
        LongseqError: for vectors that are not finite, as they are or as numbers of ``wanted.dtype``.
    """
    if len(group) == 1 and len(group[0].row) > BATCH_TOKENS:
        record = group[0]
        read = [_Pooling(record.length, wanted) for _ in wanted.layers]
        for layer, pooling in zip(wanted.layers, read, strict=True):
            for start, tile in hidden_in_tiles(model, record.row, layer=layer):
                pooling.add(start, tile[0].float().cpu().numpy())
        return [_embedded(record, read, model.spec.dim)]
    tokens = padded([record.row for record in group], vocabulary.pad)
    found = _layers(model, on_device(tokens, vocabulary.pad, model.embedding.weight.device), wanted.layers)
    made = []
    for number, record in enumerate(group):
        read = [_Pooling(record.length, wanted) for _ in wanted.layers]
        for hidden, pooling in zip(found, read, strict=True):
            pooling.add(0, hidden[number, : len(record.row)])
        made.append(_embedded(record, read, model.spec.dim))
    return made


def _layers(model: PerformerLM, inputs: tuple[Any, ...], layers: Sequence[Layer]) -> list[Vectors]:
    """(B, L, E) of each layer, all of one pass."""
    blocks = model.spec.depth
    through: list[Tensor] = []
    if len(layers) == 1:
        found = {layers[0]: model.hidden(*inputs, layer=layers[0])}
    else:
        last = max(blocks if layer is None else layer for layer in layers)
        if last:
            model.hidden(*inputs, layer=last, states=through)
        found = {number: x for number, x in enumerate(through) if number}
        if 0 in layers:  # what enters the first block has positions, too
            found[0] = model.hidden(*inputs, layer=0)
        if None in layers:
            found[None] = model.norm(found[blocks])
    return [found[layer].float().cpu().numpy() for layer in layers]


class _Pooling:
    """A record's vectors of one layer, as its tiles come."""

    def __init__(self, length: int, wanted: Wanted):
        self.length, self.wanted = length, wanted
        self.total: Vectors | None = None
        self.kept: list[Vectors] = []

    def add(self, start: int, rows: Vectors) -> None:
        """rows (T, E) of the tokens from ``start`` on."""
        own = rows[max(0, 1 - start) : max(0, 1 + self.length - start)]
        part = own.sum(0, dtype=np.float64)
        refuse_what_is_not_finite(torch.from_numpy(part))
        if self.wanted.per_residue:
            self.kept.append(self._narrowed(own))
        if self.wanted.pool == "bos":
            self.total = rows[0].copy() if start == 0 else self.total
        elif self.wanted.pool == "mean":
            self.total = part if self.total is None else self.total + part
        elif len(own):
            top = own.max(0)
            self.total = top if self.total is None else np.maximum(self.total, top)

    def pooled(self, dim: int) -> Vectors:
        if self.total is None or (self.wanted.pool == "mean" and not self.length):
            return np.full(dim, np.nan, self.wanted.dtype)
        refuse_what_is_not_finite(torch.from_numpy(self.total))
        return self._narrowed(self.total / self.length if self.wanted.pool == "mean" else self.total)

    def residues(self) -> Vectors:
        return self.kept[0] if len(self.kept) == 1 else np.concatenate(self.kept)

    def _narrowed(self, x: Vectors) -> Vectors:
        limit = float(np.finfo(self.wanted.dtype).max)
        if self.wanted.dtype != "float32" and np.abs(x).max(initial=0.0) > limit:
            raise LongseqError(
                f"dtype={self.wanted.dtype}: the model's vectors have numbers above its largest, {limit:,.0f}; take "
                "float32."
            )
        return x.astype(self.wanted.dtype, copy=False)


def _embedded(record: Record, read: list[_Pooling], dim: int) -> Embedded:
    wanted = read[0].wanted
    pooled = [layer.pooled(dim) for layer in read]
    residues = [layer.residues() for layer in read] if wanted.per_residue else None
    if wanted.several:
        stacked = None if residues is None else np.stack(residues)
        return Embedded(record.identifier, record.length, np.stack(pooled), stacked)
    return Embedded(record.identifier, record.length, pooled[0], None if residues is None else residues[0])
