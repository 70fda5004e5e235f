"""The batch that probes look at: the same sequence at every step, on every rank and after every resume."""

from __future__ import annotations

import torch
from torch import Tensor

from longseq.config.schema import Config
from longseq.data import split_spec
from longseq_data.samples.batches import EvaluationBatches, Loader

# Exact attention is quadratic, and a probe should cost less than a step: longer sequences are cut.
PROBE_LENGTH = 512


def probe_batch(config: Config, device: torch.device) -> dict[str, Tensor]:
    """The first validation sequence, or of the training data where none are held out, as a batch of one row."""
    spec = split_spec(config, "valid" if config.trainer.valid_every else "train")
    batches = EvaluationBatches(spec, batch_sequences=1, rank=0, world=1, max_samples=1)
    batch = next(iter(Loader(batches, workers=0)))
    return {name: tensor[:, :PROBE_LENGTH].to(device) for name, tensor in batch.items() if tensor.ndim > 1}
