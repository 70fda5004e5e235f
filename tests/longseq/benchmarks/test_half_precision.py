"""The emulation of a GPU's roundings: without them it is the attention itself, with them it is as near as bf16 is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longseq.attention import FavorAttention
from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.benchmarks import half_precision


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0.0, 2e-5), (torch.bfloat16, 3e-4, 5e-3)])
def test_outputs_and_gradients(monkeypatch, std, dtype, least, most):
    """Relative errors; q, k, v and the projection are bf16 numbers, so that only the products' operands differ."""

    def rounded(*arguments: object, **options: object) -> FeatureMap:
        phi = feature_map(*arguments, **options)
        return replace(phi, weight=phi.weight.bfloat16().float())

    monkeypatch.setattr(half_precision, "feature_map", rounded if dtype == torch.bfloat16 else feature_map)
    torch.manual_seed(0)
    layer = FavorAttention(64, 2, causal=True, window=32, features=64, learned_share=True, learned_decay=True)
    q, k, v = ((scale * torch.randn(2, 2, 150, 32)).bfloat16().float().requires_grad_() for scale in (std, std, 1.0))
    weights = torch.randn(2, 2, 150, 32).bfloat16().float()

    def result(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))]

    right = result(half_precision.mix(layer, q, k, v, torch.float32))
    if dtype == torch.float32:
        right = result(layer.mix(q, k, v, None, None))
    for found, wanted in zip(result(half_precision.mix(layer, q, k, v, dtype)), right, strict=True):
        error = ((found - wanted).norm() / wanted.norm()).item()
        assert least <= error <= most


def test_a_query_depends_on_no_later_key():
    torch.manual_seed(0)
    layer = FavorAttention(32, 2, causal=True, window=8, features=32, learned_decay=True)
    q, k, v = (torch.randn(1, 2, 60, 16) for _ in "qkv")
    before = half_precision.mix(layer, q, k, v)
    for x in (k, v):
        x[:, :, 41:] += 3 * torch.randn(19, 16)
    assert torch.equal(half_precision.mix(layer, q, k, v)[:, :, :41], before[:, :, :41])
