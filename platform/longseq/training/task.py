"""The LightningModule: loss, accuracy, optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from longseq.attention.arguments import hashed
from longseq.config.schema import Config
from longseq.data import sources_of, vocabulary
from longseq.devices import on_cuda
from longseq.models.compiling import compile_blocks
from longseq.models.performer import PerformerLM
from longseq.training.collectives import all_sum, context_group
from longseq.training.optim import bind, build_optimizer, build_schedule, follow_config
from longseq.training.transfer import begin_wide
from longseq_data.samples.slices import sliced
from longseq_data.vocabulary import IGNORE, Vocabulary

Batch = dict[str, Tensor]


class LanguageModelling(pl.LightningModule):
    """Trains a :class:`PerformerLM` on batches of tokens and targets, for both objectives.

    ``train_sums`` and ``valid_sums`` hold [Σ loss, correct, targets, unpadded tokens, tokens] of this rank since
    their reader last took them; the callbacks turn them into curves.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        torch.manual_seed(config.run.seed)
        tokens = vocabulary(config)
        self.pad = tokens.pad
        self.model: PerformerLM = self.build_model(tokens, on_cuda(config))
        begin_wide(self.model, config.optim, self.model.spec.dim)
        if config.trainer.compile:
            compile_blocks(self.model)
        self.train_sums = Sums()
        self.valid_sums = Sums()
        found = sources_of(config, "valid") if config.trainer.valid_every else []
        # The same of each source of a validation, where they have names.
        self.source_sums = {where.name: Sums() for where in found if where.name}
        self.part = 0  # the source of the last batch
        self.samples = 0  # consumed by all ranks together, once the step of the last batch is done
        # Given the loss of a batch and its targets: the factor 1, or NaN for a step that must not be taken; and
        # whether the curves show it.
        self.judge_loss: Callable[[Tensor, Tensor], tuple[float, bool]] | None = None
        self.validated: tuple[int, float] | None = None  # step and loss of the last validation
        self.settled = False  # whether there is nothing more to learn: this step is the last one

    def build_model(self, tokens: Vocabulary, on_cuda: bool) -> PerformerLM:
        """What is trained, new."""
        return PerformerLM(self.config.performer_spec(tokens.size, on_cuda=on_cuda))

    def quality(self, sums: Tensor) -> dict[str, float]:
        """Loss (nats a target), perplexity, bits a target and accuracy from [Σ loss, correct, targets, ...]."""
        loss_sum, correct, targets = sums[:3].tolist()
        loss = loss_sum / max(targets, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits": loss / math.log(2),
            "accuracy": correct / max(targets, 1),
        }

    def setup(self, stage: str) -> None:
        parts = self.config.trainer.context_parallel
        if parts > 1 and self.model.context is None:
            self.model.set_context(context_group(parts))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        self.model.set_step(step)
        if self.config.model.dropout:
            torch.manual_seed(hashed(7, "dropout", self.config.run.seed, step, batch_idx, self.global_rank))
        counted = self.train_sums.total
        trainer: Any = self.trainer
        with trainer.profiler.profile("forward"):  # without waiting for other ranks
            loss_sum = self._score(batch, self.train_sums)
        if self.judge_loss is not None:
            factor, counts = self.judge_loss(loss_sum, (batch["targets"] != IGNORE).sum())
            loss_sum = loss_sum * factor
            if not counts:
                self.train_sums.total = counted  # the curves go on without it
        # All targets of the optimiser step, over ranks and accumulated batches, so the step's gradient is that of the
        # mean over its targets however they are spread. What is multiplied by here is divided by elsewhere: by
        # DeepSpeed, which averages over ranks and accumulated batches, and by Lightning, over the latter once more; DDP
        # averages over ranks alone. Ranks that hold slices of the same samples all count the targets of all of them.
        targets = (all_sum(batch["step_targets"].clone()) // self.config.trainer.context_parallel).clamp(min=1)
        settings = self.config.trainer
        divisions = 2 if settings.strategy == "deepspeed" else 1
        return loss_sum * (self.trainer.world_size * settings.accumulate**divisions / targets)

    def on_train_start(self) -> None:
        # A restored optimiser brings the settings it was saved with; those of the configuration hold.
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        follow_config(optimizer, schedule, self.config, self.trainer.global_step)
        bind(self, optimizer)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sources = list(self.source_sums.values())[self.part :][:1]
        self._score(batch, self.valid_sums, *sources)

    def valid_loss_at(self, step: int) -> float | None:
        """The loss of the validation at ``step``, if there was one and the loss is a number."""
        at, loss = self.validated or (-1, 0.0)
        return loss if at == step and math.isfinite(loss) else None

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim, self.model.spec.dim)
        schedule = build_schedule(optimizer, self.config.optim, self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _score(self, batch: Batch, *counted: Sums) -> Tensor:
        """Sum of the losses over the batch's targets, which are ``counted``."""
        tokens, targets = batch["tokens"], batch["targets"]
        real = tokens != self.pad
        loss_sum, correct = self.model(tokens, batch.get("padding"), batch.get("segments"), targets)
        scored = (targets != IGNORE).sum()
        for sums in counted:
            sums.add(loss_sum.detach(), correct, scored, real.sum(), torch.full_like(correct, tokens.numel()))
        return loss_sum

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = dict(batch)  # without the numbers that no device needs
        self.samples = int(batch.pop("samples", self.samples))
        self.part = int(batch.pop("part", 0))
        context = self.model.context
        if context is not None:
            batch = sliced(batch, context.rank, context.size, self.pad)
        real = batch["tokens"] != self.pad
        return batch if bool(real.all()) else {**batch, "padding": real}


class Sums:
    """Running sums of what a step counts, in float64 so that they do not drift."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, *values: Tensor) -> None:
        row = torch.stack([value.to(values[0].device, torch.float64) for value in values])
        self.total = row if self.total is None else self.total + row

    @property
    def finite(self) -> bool:
        """Whether this rank's loss has been finite since the sums were last taken."""
        return self.total is None or bool(self.total[0].isfinite())

    def over_ranks(self, device: torch.device) -> Tensor:
        """[Σ loss, correct, targets, unpadded tokens, tokens] of all ranks together, on the CPU. All must call it."""
        total = torch.zeros(5, dtype=torch.float64, device=device) if self.total is None else self.total.clone()
        return all_sum(total).cpu()

    def take(self, device: torch.device) -> Tensor:
        """As :meth:`over_ranks`, and start again from zero."""
        total = self.over_ranks(device)
        self.total = None
        return total

    def restore(self, loss_sum: float, correct: float, targets: float, device: torch.device) -> None:
        """Begin with what was counted, and not yet shown, when a checkpoint was written. Tokens time speed, so 0."""
        self.total = torch.tensor([loss_sum, correct, targets, 0.0, 0.0], dtype=torch.float64, device=device)
