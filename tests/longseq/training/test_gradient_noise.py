"""The gradient noise scale against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longseq.config.loading import load_config
from longseq.errors import ConfigError
from longseq.training.callbacks.gradient_noise import noise_and_signal


def test_noise_and_signal_are_those_of_two_half_batches(task, batch):
    task = task("model.dropout=0.3")
    gradients = []
    for rows in (slice(0, 3), slice(3, 6)):
        task.eval().zero_grad()
        logits = task.model(batch["tokens"][rows])
        F.cross_entropy(logits.flatten(0, 1), batch["targets"][rows].flatten(), ignore_index=-100).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in task.parameters()]))
    a, b = gradients
    task.train().zero_grad()
    noise, signal, _ = noise_and_signal(task, batch).tolist()
    assert noise == pytest.approx(float(3 * (a - b).square().sum() / 2), rel=1e-5)
    assert signal == pytest.approx(float(a @ b), rel=1e-5)
    assert task.training
    assert all(p.grad is None for p in task.parameters()), "the training step must not notice"


def test_equal_halves_have_no_noise(task, batch):
    twice = {name: torch.cat((tensor[:3], tensor[:3])) for name, tensor in batch.items() if tensor.ndim}
    noise, signal, _ = noise_and_signal(task(), twice).tolist()
    assert noise == 0
    assert signal > 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.accumulate=4", "has 1 sequence"),
        ("trainer.zero_stage=3", "trainer.zero_stage=3"),
        ("trainer.activation_checkpointing=true", "trainer.activation_checkpointing=true"),
        ("model.sequence_tile=32", "model.sequence_tile=32"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, override, words):
    with pytest.raises(ConfigError, match=words):
        load_config("small.yaml", ["data.train=proteins.fasta", "trainer.noise_every=5", override])
