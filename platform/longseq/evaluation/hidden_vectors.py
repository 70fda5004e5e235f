"""A model's inner vectors of sequences, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

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
        read = _Pooling.of(record, wanted, model.spec.dim)
        for pooling in read:
            for start, tile in hidden_in_tiles(model, record.row, layer=pooling.layer):
                pooling.add(start, tile[0].float().cpu().numpy())
        return [_embedded(record, read)]
    tokens = padded([record.row for record in group], vocabulary.pad)
    found = _layers(model, on_device(tokens, vocabulary.pad, model.embedding.weight.device), wanted.layers)
    made = []
    for number, record in enumerate(group):
        read = _Pooling.of(record, wanted, model.spec.dim)
        for hidden, pooling in zip(found, read, strict=True):
            pooling.add(0, hidden[number, : len(record.row)])
        made.append(_embedded(record, read))
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
    """A record's vectors of one layer, as its tiles come.

    kept: (length, E), to be filled with those of residues; None: they are not wanted.
    """

    def __init__(self, record: Record, layer: Layer, wanted: Wanted, dim: int, kept: Vectors | None):
        self.record, self.layer, self.wanted, self.dim, self.kept = record, layer, wanted, dim, kept
        self.total: Vectors | None = None

    @classmethod
    def of(cls, record: Record, wanted: Wanted, dim: int) -> list[Self]:
        """Of each layer; residues are parts of one array (layers, length, E), so memory holds them once."""
        shape = len(wanted.layers), record.length, dim
        kept = np.empty(shape, wanted.dtype) if wanted.per_residue else [None] * len(wanted.layers)
        return [cls(record, layer, wanted, dim, part) for layer, part in zip(wanted.layers, kept, strict=True)]

    def add(self, start: int, rows: Vectors) -> None:
        """rows (T, E) of the tokens from ``start`` on."""
        own = rows[max(0, 1 - start) : max(0, 1 + self.record.length - start)]
        part = own.sum(0, dtype=np.float64)
        refuse_what_is_not_finite(torch.from_numpy(part))
        if self.kept is not None:
            first = max(0, start - 1)
            self.kept[first : first + len(own)] = self._narrowed(own)
        if self.wanted.pool == "bos":
            self.total = rows[0].copy() if start == 0 else self.total
        elif self.wanted.pool == "mean":
            self.total = part if self.total is None else self.total + part
        elif len(own):
            top = own.max(0)
            self.total = top if self.total is None else np.maximum(self.total, top)

    def pooled(self) -> Vectors:
        length = self.record.length
        if self.total is None or (self.wanted.pool == "mean" and not length):
            return np.full(self.dim, np.nan, self.wanted.dtype)
        refuse_what_is_not_finite(torch.from_numpy(self.total))
        return self._narrowed(self.total / length if self.wanted.pool == "mean" else self.total)

    def _narrowed(self, x: Vectors) -> Vectors:
        limit = float(np.finfo(self.wanted.dtype).max)
        if self.wanted.dtype != "float32" and np.abs(x).max(initial=0.0) > limit:
            raise LongseqError(
                f"dtype={self.wanted.dtype}: the vectors of {self.record.identifier}, layer "
                f"{'last' if self.layer is None else self.layer}, have numbers above its largest, {limit:,.0f}; take "
                "float32."
            )
        return x.astype(self.wanted.dtype, copy=False)


def _embedded(record: Record, read: list[_Pooling]) -> Embedded:
    """read: as of ``_Pooling.of``, filled."""
    wanted, kept = read[0].wanted, read[0].kept
    pooled, residues = read[0].pooled(), kept
    if wanted.several:
        pooled = np.stack([layer.pooled() for layer in read])
        residues = None if kept is None else kept.base
    return Embedded(record.identifier, record.length, pooled, residues, wanted.pool)
