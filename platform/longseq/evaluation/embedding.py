"""A model's inner vectors of sequences, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longseq.evaluation.records import Record, batches
from longseq.models.performer import PerformerLM
from longseq_data.vocabulary import Vocabulary


class Embedded(NamedTuple):
    identifier: str
    residues: npt.NDArray[np.float32]  # (length, E), without the special tokens around

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """(E,), summed in float64; NaN of a record without residues."""
        if not len(self.residues):
            return np.full(self.residues.shape[1], np.nan, dtype=np.float32)
        return self.residues.mean(0, dtype=np.float64).astype(np.float32)


@torch.inference_mode()
def vectors(
    model: PerformerLM, vocabulary: Vocabulary, records: Iterable[Record], layer: int | None
) -> Iterator[Embedded]:
    """The vectors of each record, in their order. Memory holds one batch.

    Args:
        layer: 0: the embedding; k: the output of block k; None: of the last block after the final norm, which is what
            the head reads.
    """
    device = next(model.parameters()).device
    caught: list[Tensor] = []
    module = model.norm if layer is None else model.embedding if layer == 0 else model.blocks[layer - 1]

    def catch(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        # A block with the value residual hands on the first layer's values besides.
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(catch)
    try:
        for group in batches(records, lambda record: len(record.row)):
            tokens = torch.full((len(group), max(len(record.row) for record in group)), vocabulary.pad)
            for into, record in zip(tokens, group, strict=True):
                into[: len(record.row)] = torch.from_numpy(record.row.astype(np.int64))
            real = tokens != vocabulary.pad
            model.hidden(tokens.to(device), None if bool(real.all()) else real.to(device))
            found = caught.pop().float().cpu().numpy()  # (B, L, E)
            for row, record in zip(found, group, strict=True):
                yield Embedded(record.identifier, row[1 : 1 + record.length])
    finally:
        handle.remove()
