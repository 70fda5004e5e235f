"""A model's inner vectors of sequences, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.evaluation.log_probabilities import refuse_what_is_not_finite
from longseq.evaluation.padded import on_device, padded
from longseq.evaluation.records import BATCH_TOKENS, Record, batches
from longseq.models.performer import PerformerLM
from longseq_data.vocabulary import Vocabulary

Vectors = npt.NDArray[np.float32]


class Embedded(NamedTuple):
    identifier: str
    length: int
    mean: Vectors  # (E,) over the residues, summed in float64; NaN of a record without any
    residues: Vectors | None = None  # (length, E), without the special tokens around; None: they were not asked for


@torch.inference_mode()
def vectors(
    model: PerformerLM,
    vocabulary: Vocabulary,
    records: Iterable[Record],
    layer: int | None,
    *,
    per_residue: bool = True,
) -> Iterator[Embedded]:
    """The vectors of each record, in their order. Memory holds a batch, of longer records a tile and what is asked for.

    Args:
        layer: 0: the embedding; k: the output of block k; None: of the last block after the final norm, which is what
            the head reads.
        per_residue: whether the vectors of residues are wanted, too.
    """
    for group in batches(records, lambda record: len(record.row)):
        yield from of_batch(model, vocabulary, group, layer, per_residue)


@torch.inference_mode()
def of_batch(
    model: PerformerLM, vocabulary: Vocabulary, group: Sequence[Record], layer: int | None, per_residue: bool
) -> list[Embedded]:
    """The same of records that are read together, as :func:`longseq.evaluation.records.batches` puts them."""
    if len(group) == 1 and len(group[0].row) > BATCH_TOKENS:
        return [_in_tiles(model, group[0], layer, per_residue)]
    tokens = padded([record.row for record in group], vocabulary.pad)
    hidden = model.hidden(*on_device(tokens, vocabulary.pad, model.embedding.weight.device), layer=layer)
    found = hidden.float().cpu().numpy()  # (B, L, E)
    made = []
    for row, record in zip(found, group, strict=True):
        residues = row[1 : 1 + record.length]
        mean = _mean(residues.sum(0, dtype=np.float64), record.length)
        made.append(Embedded(record.identifier, record.length, mean, residues if per_residue else None))
    return made


def _in_tiles(model: PerformerLM, record: Record, layer: int | None, per_residue: bool) -> Embedded:
    total, kept = np.zeros(model.spec.dim), []
    for start, hidden in hidden_in_tiles(model, record.row, layer=layer):
        own = hidden[0].float().cpu().numpy()
        own = own[max(0, 1 - start) : 1 + record.length - start]
        total += own.sum(0, dtype=np.float64)
        if per_residue:
            kept.append(own)
    residues = np.concatenate(kept) if per_residue else None
    return Embedded(record.identifier, record.length, _mean(total, record.length), residues)


def _mean(total: npt.NDArray[np.float64], length: int) -> Vectors:
    refuse_what_is_not_finite(torch.from_numpy(total))
    return (total / length if length else np.full_like(total, np.nan)).astype(np.float32)
