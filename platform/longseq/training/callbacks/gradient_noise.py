"""The gradient noise scale: how large a batch is worth its tokens (McCandlish et al. 2018, arXiv 1812.06162).

Of two gradients g₁, g₂ over disjoint halves of b sequences each, at the same weights,

    signal = g₁ᵀg₂              estimates |G|², G the gradient over all data
    noise  = b · |g₁ − g₂|² / 2  estimates tr Σ, Σ the covariance over single sequences

without bias. Their ratio is the batch, in sequences, at which noise and signal are equal: with less, twice the batch
nearly halves the steps; with more, it saves little. Each estimate is rough, so the ratio is that of running means.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from longseq.config.schema import Config
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import due
from longseq.training.collectives import all_sum
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars
from longseq_data.vocabulary import IGNORE

_KEEP = 0.9  # of the running means, at each measurement


class GradientNoise(pl.Callback):
    """Every ``trainer.noise_every`` steps: two more gradients, each of half a micro-batch, on every rank."""

    def __init__(self, config: Config, curves: Curves):
        self.config, self.curves = config, curves
        self.noise = self.signal = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if not (first and due(step, self.config.trainer.noise_every)):
            return
        assert isinstance(task, LanguageModelling)
        with self.curves.paused(), trainer.precision_plugin.train_step_context():
            task.model.set_step(trainer.global_step)
            noise, signal, measured = all_sum(noise_and_signal(task, batch)).tolist()
        if not measured:
            return
        noise, signal = noise / measured, signal / measured
        self.noise = _KEEP * self.noise + (1 - _KEEP) * noise
        self.signal = _KEEP * self.signal + (1 - _KEEP) * signal
        points = {"noise": noise, "signal": signal}
        if self.signal > 0:
            points["noise_scale_tokens"] = self.noise / self.signal * batch["tokens"].shape[1]
        log_scalars(trainer, "gradient_noise", points, step)

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self.noise, "signal": self.signal}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.noise, self.signal = state_dict["noise"], state_dict["signal"]


def noise_and_signal(task: LanguageModelling, batch: dict[str, Tensor]) -> Tensor:
    """Estimates of tr Σ a sequence and of |G|², and 1, (3,) float64; zeros from a micro-batch of a single sequence."""
    half = len(batch["tokens"]) // 2
    if not half:
        return torch.zeros(3, dtype=torch.float64, device=task.device)
    training = task.training
    task.eval()  # noise of the data, not of dropout
    first = _gradient(task, batch, slice(0, half))
    second = _gradient(task, batch, slice(half, 2 * half))
    task.train(training)
    signal = sum((a.double() * b).sum() for a, b in zip(first, second, strict=True))
    noise = sum((a.double() - b).square().sum() for a, b in zip(first, second, strict=True)) * half / 2
    noise, signal = torch.as_tensor(noise), torch.as_tensor(signal)
    return torch.stack([noise, signal, torch.ones_like(noise)])


def _gradient(task: LanguageModelling, batch: dict[str, Tensor], rows: slice) -> tuple[Tensor, ...]:
    """Of the mean loss over these rows. It touches no ``.grad``, so the training step does not notice."""
    tokens, targets = batch["tokens"][rows], batch["targets"][rows]
    hidden = {name: batch[name][rows] for name in ("padding", "segments") if name in batch}
    with torch.enable_grad():
        loss, _ = task.model(tokens, **hidden, targets=targets)
        loss = loss / (targets != IGNORE).sum().clamp(min=1)
        return torch.autograd.grad(loss, [p for p in task.model.parameters() if p.requires_grad])
