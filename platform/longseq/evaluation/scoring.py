"""Score a model on every target of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from longseq.evaluation.metrics import Counts, Quality
from longseq.models.performer import PerformerLM
from longseq_data.batches import EvaluationBatches, Loader
from longseq_data.documents import Extent
from longseq_data.errors import DataError
from longseq_data.sharing import Samples
from longseq_data.vocabulary import IGNORE


@dataclass(frozen=True)
class Scores:
    """The model's quality on a split and the targets it was scored on."""

    quality: Quality
    sequences: int
    targets: Counts  # (V,) how often each token was a target
    extent: Extent | None = None  # of text and images scored causally: what the targets stand for


@torch.inference_mode()
def score(
    model: PerformerLM,
    spec: Samples,
    *,
    batch_sequences: int,
    max_samples: int | None = None,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Scores:
    """One pass over the split, on the model's device.

    Args:
        model: in evaluation mode, its projections set.
        spec: what to read and how to cut it.
        batch_sequences: sequences at a time.
        max_samples: score only so many sequences; None: all.
        progress: called with the number of sequences after each batch.

    Raises:
        DataError: if the split has no targets.
    """
    device = next(model.parameters()).device
    loss_sum, correct, sequences = 0.0, 0, 0
    vocabulary = spec.vocabulary
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    extent: Extent | None = None
    batches = EvaluationBatches(
        spec.measuring(), batch_sequences=batch_sequences, rank=0, world=1, max_samples=max_samples
    )
    for batch in Loader(batches, workers=0):
        tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
        real = batch["tokens"] != vocabulary.pad
        padding = None if bool(real.all()) else real.to(device)  # exact attention needs no L × L mask without any
        segments = batch["segments"].to(device) if "segments" in batch else None
        loss, right = model(tokens, padding, segments, targets)
        loss_sum += loss.item()
        correct += int(right)
        counts += np.bincount(targets[targets != IGNORE].cpu().numpy(), minlength=vocabulary.size)
        if "bytes" in batch:
            extent = (extent or Extent(0, 0)).plus(Extent(int(batch["bytes"]), int(batch["words"])))
        sequences += int(real.any(dim=1).sum())
        progress(sequences)
    total = int(counts.sum())
    if not total:
        held_out = f" for the {spec.split} split" if spec.split else ""
        raise DataError(
            f"{', '.join(spec.sources)}: nothing to score{held_out}: hold out a larger share of the records."
        )
    return Scores(Quality(loss_sum / total, correct / total), sequences, counts, extent)
