"""Model FLOPs against torch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longseq.benchmarks.step import ReturnsV
from longseq.measure.model_flops import training_flops
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

SIZES = {"vocabulary": 29, "dim": 48, "depth": 3, "heads": 4, "ffn_dim": 80, "causal": False}


def test_linear_maps_are_counted_as_torch_counts_them():
    """With attention that costs nothing; the rest of our count is attention's."""
    spec = PerformerSpec(**SIZES, kind="exact")
    model = PerformerLM(spec)
    for block in model.blocks:
        block.attention = ReturnsV(spec.dim, spec.heads)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(29, (2, 10))).sum().backward()
    attention = training_flops(spec, 10) - counter.get_total_flops() / 20
    # Exact: 4 products of length × head_dim a query and head forward and backward twice as many... 2·L·2d·(1 + 2).
    assert attention == pytest.approx(spec.depth * spec.heads * 2 * 10 * 2 * spec.head_dim * 3)


def test_favor_costs_the_same_a_token_at_any_length_and_exact_does_not():
    favor, exact = (PerformerSpec(**SIZES, kind=kind) for kind in ("favor", "exact"))
    assert training_flops(favor, 100) == training_flops(favor, 10_000)
    assert training_flops(exact, 10_000) - training_flops(exact, 100) == 3 * 4 * 9_900 * 4 * 12 * 3
