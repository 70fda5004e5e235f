"""Sequences computed in tiles: the same loss and gradients whatever the tile, and memory that hardly grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.options import AttentionOptions
from longseq.measure.peaks import peak
from longseq.models.head import IGNORE, Head, TransformHead
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from mixing import MODERN, mix

pytestmark = pytest.mark.usefixtures("one_thread")

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
        {"kernel": "aderf", "learned_covariance": True, "window": 5},
        {"kind": "exact"},
        {"layers": (AttentionOptions(window=7, features=8), AttentionOptions(kind="exact"))},  # by layer in any case
        {"layers": (AttentionOptions(features=8), AttentionOptions(window=7, learned_decay=True))},
        {"layers": (AttentionOptions(window=5, features=0), AttentionOptions(kernel="relu", features=16)), "conv": 3},
        {"causal": False, "window": 3},
        {"window": 7, "forget_gate": True, **MODERN},
        {"causal": False, "forget_gate": True},
        {"forget_gate": True, "kind": "exact"},
        {"conv": 3, "value_residual": True, "ffn": "relu2"},
        {"causal": False, "conv": 5, "value_residual": True},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)


def build(spec: PerformerSpec) -> PerformerLM:
    torch.manual_seed(1)
    model = PerformerLM(spec).train()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(12)  # attention that selects
            block.attention.out.weight.mul_(12)
    return mix(model)


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


@pytest.mark.parametrize("carry", [True, False], ids=["carried", "by layer"])
@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, **MODERN)], ids=["classic", "modern"])
def test_tiles_see_padding_and_documents(spec, carry):
    tokens, targets = rows()
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[1, 200:] = False
    segments = torch.arange(LENGTH).expand(2, -1) // 100
    for hidden in ({"padding": padding}, {"segments": segments}):
        wanted = outcome(spec, tokens, targets, **hidden)
        found = outcome(replace(spec, sequence_tile=64, carry=carry), tokens, targets, **hidden)
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("carry", [True, False], ids=["carried", "by layer"])
def test_dropout_falls_alike_when_a_tile_is_computed_again(carry):
    """Else the gradient would be that of another network, and a step along it would gain something else."""
    model, (tokens, targets) = build(replace(SPEC, dropout=0.3, sequence_tile=64, carry=carry)).double(), rows()

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model(tokens, targets=targets)[0]

    before = loss()
    before.backward()
    steps = [(p, p.grad) for p in model.parameters()]
    square = sum(g.square().sum().item() for _, g in steps)
    with torch.no_grad():
        for p, g in steps:
            p -= 1.0 / square * g
        assert (before - loss()).item() == pytest.approx(1.0, rel=0.05)


def test_what_a_carried_step_keeps_does_not_grow_with_the_row():
    spec = replace(SPEC, sequence_tile=64, features=4)

    def most(length: int, carry: bool) -> int:
        model, (tokens, targets) = build(replace(spec, carry=carry)), rows(length, 1)

        def step() -> tuple[Tensor, ...]:
            model(tokens, targets=targets)[0].backward()
            return ()

        return peak(step, tokens.device)[0]

    stream = 4 * SPEC.dim * 4096  # bytes of one L × E tensor
    assert most(4096 + 256, True) - most(256, True) < stream / 2
    assert most(4096 + 256, False) - most(256, False) > (SPEC.depth + 1) * stream


@pytest.mark.parametrize("kind", [Head, TransformHead])
def test_the_head_scores_as_cross_entropy_does(kind, monkeypatch):
    monkeypatch.setattr("longseq.models.head.LOGITS", 1)  # tiles of 256 rows
    torch.manual_seed(0)
    head, x = kind(8, VOCABULARY), torch.randn(2, 331, 8, requires_grad=True)
    _, targets = rows()
    learned = [x, *head.parameters()]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss * 3, learned)

    loss, correct = head(x, targets)
    logits = head(x)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(loss), gradients(wanted), rtol=1e-5, atol=1e-5)
    assert correct == ((logits.argmax(-1) == targets) & (targets != IGNORE)).sum()


@pytest.mark.parametrize("kind", [Head, TransformHead])
def test_the_loss_never_holds_all_logits(kind):
    head, x, targets = kind(4, 4096), torch.randn(1, 40_960, 4), torch.zeros(1, 40_960, dtype=torch.long)

    def score() -> tuple[Tensor, ...]:
        x.requires_grad_()
        head(x, targets)[0].backward()
        return ()

    assert peak(score, x.device)[0] < 4 * 40_960 * 4096 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("carry", [False, True])
def test_a_batch_without_rows_has_gradients_of_zero(carry, dtype):
    model = build(replace(SPEC, window=7, sequence_tile=16, carry=carry))
    tokens = torch.zeros(0, 40, dtype=torch.long)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, correct = model(tokens, targets=tokens)
    loss.backward()
    assert (float(loss.detach()), int(correct)) == (0.0, 0)
    assert all(not p.grad.any() for p in model.parameters())
