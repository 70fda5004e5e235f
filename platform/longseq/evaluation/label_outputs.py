"""What a model of labels says of sequences, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from longseq.evaluation.hidden_tiles import hidden_in_tiles
from longseq.evaluation.log_probabilities import refuse_what_is_not_finite
from longseq.evaluation.padded import on_device, padded
from longseq.evaluation.records import BATCH_TOKENS, Record, batches
from longseq.evaluation.vector_options import Vectors
from longseq.models.tuned import TunedModel
from longseq.trained_model import Source
from longseq_data.readers.label_table import OF_CLASSES


@torch.inference_mode()
def told(
    source: Source, records: Iterable[Record], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Record, Vectors]]:
    """Each record, in their order, with (1, outputs) or, per residue, (n, outputs): probabilities, or numbers.

    Raises:
        LongseqError: if one is no finite number.
    """
    model = source.load(tuned=True)
    assert isinstance(model, TunedModel)
    tune, pad = source.config.finetune, source.vocabulary.pad
    device = next(model.parameters()).device
    for group in batches(records, lambda record: len(record.row), batch_tokens):
        if len(group) == 1 and len(group[0].row) > BATCH_TOKENS:
            made = _in_tiles(model, group[0])
        else:
            made = model(*on_device(padded([record.row for record in group], pad), pad, device))
        made = made.softmax(-1) if tune.task in OF_CLASSES else made.double() * tune.scale + tune.center
        for each, record in zip(made.cpu(), group, strict=True):
            own = each[1 : 1 + record.length] if model.learning.residues else each[None]
            refuse_what_is_not_finite(own)
            yield record, own.numpy()


def _in_tiles(model: TunedModel, record: Record) -> Tensor:
    """What the model gives for one record of any length, (1, outputs) or (1, L, outputs)."""
    parts: list[Tensor] = []
    total = torch.zeros(model.spec.dim, dtype=torch.float64, device=model.embedding.weight.device)
    for start, hidden in hidden_in_tiles(model, record.row):
        if model.learning.residues:
            parts.append(model.head.of_features(hidden.float()))
        else:
            total += hidden[0, max(0, 1 - start) : max(0, 1 + record.length - start)].sum(0, dtype=torch.float64)
    return torch.cat(parts, 1) if parts else model.head.of_features((total / record.length).float())[None]
