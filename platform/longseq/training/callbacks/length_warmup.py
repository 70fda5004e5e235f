"""Short sequences first: early steps learn what is near, and cost less (Li et al. 2021, arXiv 2108.06084)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor

from longseq.config.schema import Config
from longseq.config.training import TrainerConfig
from longseq_data.vocabulary import IGNORE

Batch = dict[str, Tensor]


class LengthWarmup(pl.Callback):
    """Cuts the sequences of the first ``trainer.length_warmup_steps`` steps.

    The rest of a cut sequence is not seen: the samples of later steps, and their order, are those of a run without it.
    """

    def __init__(self, config: Config, start: int):
        self.config, self.start = config, start  # the step that this start begins with

    def setup(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        whole = data.train_dataloader
        data.train_dataloader = lambda: Shortened(whole(), self.config, self.start)


class Shortened:
    """A loader's batches, cut to the length that belongs to their step."""

    def __init__(self, loader: Iterable[Batch], config: Config, start_step: int):
        self.loader, self.config, self.start_step = loader, config, start_step

    def __iter__(self) -> Iterator[Batch]:
        trainer, step = self.config.trainer, self.start_step
        batches = iter(self.loader)
        while step < trainer.length_warmup_steps:
            length = length_at(step, trainer, self.config.data.length)
            # All batches of the step at once: each is told how many targets they have together.
            cut = deque(_cut(next(batches), length) for _ in range(trainer.accumulate))
            scored = torch.stack([(batch["targets"] != IGNORE).sum() for batch in cut]).sum()
            while cut:
                yield {**cut.popleft(), "step_targets": scored}
            step += 1
        yield from batches


def length_at(step: int, config: TrainerConfig, length: int) -> int:
    """Tokens a sequence at optimiser step ``step``, counted from 0: a function of nothing else.

    It rises evenly from ``length_warmup_start`` to ``length``, in multiples of the former: few different lengths.
    """
    if step >= config.length_warmup_steps:
        return length
    start = config.length_warmup_start
    exact = start + (length - start) * step / config.length_warmup_steps
    return min(length, int(exact) // start * start)


def _cut(batch: Batch, length: int) -> Batch:
    """Every (rows, positions) tensor of a batch, to its first positions."""
    return {name: tensor[:, :length].contiguous() if tensor.ndim > 1 else tensor for name, tensor in batch.items()}
