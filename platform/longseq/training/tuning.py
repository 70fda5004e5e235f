"""Learning labels: the LightningModule of `longseq finetune`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.config.schema import Config
from longseq.label_data import labelled
from longseq.models.tuned import TunedModel
from longseq.models.weights import load_body
from longseq.trained_model import learning_of
from longseq.training.task import Batch, LanguageModelling, Sums
from longseq_data.readers.label_table import OF_CLASSES
from longseq_data.samples.batches import unpack
from longseq_data.samples.rank_share import Share
from longseq_data.samples.transport import pack
from longseq_data.vocabulary import IGNORE, Vocabulary

_ROWS, _TOKENS = 512, 1 << 16  # that features are scaled by


class LabelLearning(LanguageModelling):
    """Trains a :class:`TunedModel`: cross entropy of classes, squared error of numbers by their deviation.

    The sums are those of language modelling, their targets being labels; "correct" are classes.
    """

    model: TunedModel

    def __init__(self, config: Config):
        self.of_classes = config.finetune.task in OF_CLASSES
        super().__init__(config)

    def build_model(self, tokens: Vocabulary, on_cuda: bool) -> TunedModel:
        return TunedModel(self.config.performer_spec(tokens.size, on_cuda=on_cuda), learning_of(self.config))

    def quality(self, sums: Tensor) -> dict[str, float]:
        loss_sum, correct, targets = sums[:3].tolist()
        loss = loss_sum / max(targets, 1)
        if self.of_classes:
            return {"loss": loss, "accuracy": correct / max(targets, 1)}
        return {"loss": loss, "rmse": math.sqrt(loss) * self.config.finetune.scale}

    def _score(self, batch: Batch, *counted: Sums) -> Tensor:
        tokens, targets = batch["tokens"], batch["targets"]
        made = self.model(tokens, batch.get("padding"))
        found = made if self.model.learning.residues else made[:, None]  # (B, L or 1, outputs)
        scored = targets != IGNORE
        if self.of_classes:
            loss_sum = F.cross_entropy(found.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            correct = ((found.argmax(-1) == targets) & scored).sum()
        else:
            wanted = targets.to(torch.int32).view(torch.float32).where(scored, 0.0)
            loss_sum = ((found[..., 0] - wanted).square() * scored).sum()
            correct = torch.zeros_like(scored.sum())
        real = tokens != self.pad
        for sums in counted:
            sums.add(loss_sum.detach(), correct, scored.sum(), real.sum(), torch.full_like(correct, tokens.numel()))
        return loss_sum

    def begin_with(self, weights: Path, device: torch.device) -> None:
        """Take a language model's weights, and the head's scale from what it makes of the first training rows: the
        same on every rank.

        Raises:
            RunError: for the weights of another architecture.
        """
        load_body(self.model, weights)
        self.model.to(device).eval()
        self.model.scale(_first_rows(self.config, device))
        self.model.to("cpu").train()


def _first_rows(config: Config, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tokens and padding of training rows in the order of the training."""
    samples = labelled(config, "train")
    left = _TOKENS
    for make in islice(samples.training(0, Share(8, 1, 0, 1)), -(-min(_ROWS, len(samples)) // 8)):
        tokens = unpack(pack(make()))["tokens"].to(device)
        real = tokens != samples.vocabulary.pad
        yield tokens, None if bool(real.all()) else real
        left -= tokens.numel()
        if left < 0:
            return
