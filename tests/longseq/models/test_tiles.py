"""Sequences computed in tiles: whatever the tile, the same loss and the same gradients, and nothing as long as the row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.benchmarks.memory import peak
from longseq.models.head import IGNORE, Head
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

VOCABULARY = 11
SPEC = PerformerSpec(vocabulary=VOCABULARY, dim=24, depth=2, heads=3, ffn_dim=20, causal=True, features=16)
LENGTH = 331

kinds = pytest.mark.parametrize(
    "options",
    [
        {"kernel": "softmax"},
        {"kernel": "relu", "backend": "torch"},
        {"window": 7, "learned_share": True, "learned_decay": True, "qk_norm": True},
        {"learned_decay": True},
        {"window": 5, "features": 0},
        {"kernel": "cos"},
        {"kernel": "oprf"},
        {"attention": "exact"},
        {"causal": False, "window": 3},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(spec: PerformerSpec) -> PerformerLM:
    torch.manual_seed(1)
    model = PerformerLM(spec).train()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(12)  # attention that selects
            block.attention.out.weight.mul_(12)
    return model


def rows(length: int = LENGTH, batch: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(length)
    tokens, targets = torch.randint(VOCABULARY, (2, batch, length), generator=rng)
    targets[torch.rand(batch, length, generator=rng) < 0.2] = IGNORE
    return tokens, targets


def outcome(spec: PerformerSpec, tokens: Tensor, targets: Tensor, **hidden: Tensor) -> tuple[object, ...]:
    """Loss, correct targets and every gradient of one training step's second look at a batch."""
    model = build(spec)
    if spec.kernel == "oprf":
        with torch.no_grad():
            model(tokens[:, :50])  # fixes the kernel's constant
    torch.manual_seed(5)
    loss, correct = model(tokens, targets=targets, **hidden)
    (loss * 0.01).backward()
    return loss.detach(), correct, {name: p.grad for name, p in model.named_parameters()}


@kinds
@pytest.mark.parametrize("tile", [64, 110])
@pytest.mark.parametrize("carry", [True, False], ids=["carried", "by layer"])
def test_tiles_change_neither_loss_nor_gradients(options, tile, carry):
    spec = replace(SPEC, **options)
    wanted = outcome(spec, *rows())
    found = outcome(replace(spec, sequence_tile=tile, carry=carry), *rows())
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    assert all(gradient.abs().max() > 0 for gradient in found[2].values())
