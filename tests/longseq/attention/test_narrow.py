"""Weights in the dtype of autocast: the numbers are autocast's own, and the modules stay as they are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from longseq.attention import narrow
from longseq.attention.narrow import Linear, narrowed
from longseq.models.layers import Block
from longseq.models.spec import PerformerSpec

BF16, F32 = torch.bfloat16, torch.float32
SPEC = PerformerSpec(vocabulary=11, dim=24, depth=1, heads=2, ffn_dim=40, causal=True, features=32)


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longseq.attention.fused.ELSEWHERE", True)


def _block() -> Block:
    torch.manual_seed(0)
    return Block(SPEC, 0)


def _results(block: Block, dtype: torch.dtype = BF16) -> list[Tensor]:
    """What a step gives: the output and all gradients."""
    x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    block.zero_grad()
    with torch.autocast("cpu", dtype):
        out = block(x, None, None, None)
    out.float().square().sum().backward()
    learned = [p for p in block.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == F32 for p in learned)
    return [out.detach(), x.grad, *(p.grad.clone() for p in learned)]


def _lora(block: Block) -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(24, 2, bias=False), nn.Linear(2, 72, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    block.requires_grad_(False)
    block.attention.qkv = Adapted(block.attention.qkv)


def _frozen(block: Block) -> None:
    for name, p in block.named_parameters():
        p.requires_grad_("bias" in name)


WAYS: dict[str, Callable[[Block], object]] = {
    "as it is": lambda block: None,
    "adapted": _lora,
    "another map": lambda block: setattr(block.attention, "qkv", nn.Linear(24, 72)),
    "biases alone": _frozen,
    "normalised": lambda block: nn.utils.parametrizations.weight_norm(block.mlp[0]),
    "normalised before each pass": lambda block: nn.utils.weight_norm(block.mlp[0]),
    "spectral": lambda block: nn.utils.spectral_norm(block.mlp[2]).eval(),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_a_block_computes_what_autocast_computes(monkeypatch, way, dtype):
    block = _block()
    torch.manual_seed(2)
    WAYS[way](block)
    found = _results(block, dtype)
    monkeypatch.setattr("longseq.models.layers.narrowed", lambda maps: nullcontext())
    assert all(map(torch.equal, found, _results(block, dtype)))


def test_frozen_weights_get_no_gradient_computed():
    block, seen = _block(), {}
    _frozen(block)
    for name in ("weight", "bias"):
        block.mlp[0].register_forward_pre_hook(
            lambda module, args, n=name: seen.update({n: narrow._inside.weights[module][n == "bias"].requires_grad})
        )
    _results(block)
    assert seen == {"weight": False, "bias": True}


def test_modules_are_as_they_were_inside_and_in_another_thread():
    linear = Linear(3, 3)
    own, x = dict(linear.named_parameters()), torch.randn(2, 3)
    exact, other = linear(x).detach(), []
    with torch.autocast("cpu", BF16), narrowed([linear]):
        assert all(p is own[name] for name, p in linear.named_parameters())
        assert all(torch.equal(x, own[name]) for name, x in linear.state_dict().items())
        assert torch.equal(copy.deepcopy(linear).weight, linear.weight)
        thread = threading.Thread(target=lambda: other.append(linear(x).detach()))
        thread.start()
        thread.join()
        assert linear(x).dtype == BF16
    assert torch.equal(other[0], exact)  # autocast is a thread's own, too


def test_an_error_inside_leaves_nothing_behind():
    linear, x = Linear(3, 3), torch.ones(2, 3)
    exact = linear(x)
    with (
        torch.autocast("cpu", BF16),
        pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"),
        narrowed([linear]),
    ):
        linear(torch.ones(2, 4))
    assert torch.equal(linear(x), exact)


def test_one_inside_another_ends_on_its_own():
    a, b, x = Linear(3, 3), Linear(3, 3), torch.ones(2, 3)
    with torch.autocast("cpu", BF16), narrowed([a]):
        with narrowed([b]):
            assert narrow._inside.weights.keys() == {a, b}
        assert narrow._inside.weights.keys() == {a}
        assert torch.equal(b(x), torch.nn.functional.linear(x, b.weight, b.bias))
    assert not narrow._inside.weights
