"""What the attention probe says of each layer is what the layer computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longseq.attention.projections import projection_matrix
from longseq.attention.reference import quadratic_attention
from longseq.measure.attention_probe import errors
from longseq.models.layers import Block
from longseq.training.callbacks.attention_probe import probe
from longseq.training.callbacks.heatmaps import heatmaps


def first_layer(task, tokens):
    """Queries, keys and values of the first block, from its parts."""
    block, model = task.model.blocks[0], task.model
    assert isinstance(block, Block)
    rotary = model._rotary(torch.arange(tokens.shape[1]))
    return block.attention.project(block.attention_norm(model.embedding(tokens)), rotary)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_error_and_maps_are_those_of_the_definition(task, batch, objective):
    task = task(f"model.objective={objective}")
    row = {"tokens": batch["tokens"][:1]}
    layers = probe(task.model, row)
    assert len(layers) == 2
    with torch.no_grad():
        q, k, v = first_layer(task, row["tokens"])
    omega = projection_matrix(32, 16, seed=0, layer=0, draw=0)
    causal, eye = objective == "causal", torch.eye(17).expand(1, 2, 17, 17)
    own = quadratic_attention(q, k, v, omega, causal=causal)
    mask = torch.ones(17, 17).tril().bool() if causal else torch.ones(17, 17).bool()
    weights = ((q @ k.mT).double() / 4).masked_fill(~mask, -torch.inf).softmax(-1)
    exact = weights @ v.double()
    assert layers[0].error == pytest.approx(float((own - exact).norm() / exact.norm()), rel=1e-4)
    assert layers[0].error > 1e-3
    torch.testing.assert_close(layers[0].exact.double(), weights[0], atol=1e-6, rtol=0)
    own_map = quadratic_attention(q, k, eye, omega, causal=causal)[0]
    torch.testing.assert_close(layers[0].own.double(), own_map, atol=1e-5, rtol=0)


def test_maps_of_a_bf16_model_are_those_of_its_rounded_projection(task, batch):
    task = task("model.objective=causal").to(torch.bfloat16)
    row = {"tokens": batch["tokens"][:1]}
    with torch.no_grad():
        for block in task.model.blocks:
            block.attention.qkv.weight.mul_(20)  # so that the weights depend on ω
        q, k, _ = first_layer(task, row["tokens"])
    own = probe(task.model, row)[0].own
    omega = projection_matrix(32, 16, seed=0, layer=0, draw=0, dtype=torch.float64)
    rounded = (omega * 16**-0.25).bfloat16().double() * 16**0.25
    eye = torch.eye(17).expand(1, 2, 17, 17)

    def off(omega: torch.Tensor) -> float:
        expected = quadratic_attention(q.double(), k.double(), eye.double(), omega, causal=True)[0]
        return float((own.double() - expected).norm() / expected.norm())

    assert off(rounded) < 2e-3 < off(omega) / 2


def test_exact_attention_has_no_error(task, batch):
    row = {"tokens": batch["tokens"][:1]}
    for overrides in (("attention.kind=exact",), ("attention.window=17", "attention.learned_decay=true")):
        for layer in probe(task(*overrides).model, row):
            assert layer.error < 1e-6
            torch.testing.assert_close(layer.own, layer.exact, atol=1e-6, rtol=0)


def test_of_a_plan_the_layers_with_features_have_errors(task, batch):
    task = task("attention.layers=[favor, exact]")
    row = {"tokens": batch["tokens"][:1]}
    first, second = probe(task.model, row)
    assert first.error > 1e-3 > 1e-6 > second.error
    ((own, *_),) = errors(task.model, row, [32], draws=1)
    assert own == [pytest.approx(first.error, rel=1e-5)]


def test_a_probe_leaves_the_model_as_it_was(task, batch):
    task = task("model.dropout=0.5").train()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    state = torch.get_rng_state()
    probe(task.model, {"tokens": batch["tokens"][:1]})
    assert task.training
    assert all(module.training for module in task.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state_dict().items())
    assert not any("mix" in vars(block.attention) for block in task.model.blocks)


def test_a_picture_is_brightest_where_the_weight_is_largest():
    weights = torch.zeros(2, 16, 16)
    weights[0, 3, 12] = weights[1, 15, 0] = 0.7
    picture = heatmaps("title", {"own": weights, "exact": weights.flip(0)})
    height, width, channels = picture.shape
    assert channels == 3
    side, dark = 256, np.array([0, 0, 4])
    for row, heads in ((0, [(3, 12), (15, 0)]), (1, [(15, 0), (3, 12)])):
        for head, place in enumerate(heads):
            top, left = 54 + row * (side + 35), 8 + head * (side + 8)
            square = picture[top : top + side, left : left + side].reshape(16, 16, 16, 16, 3)[:, 8, :, 8]
            assert np.unravel_index(square.sum(-1).argmax(), (16, 16)) == place
            assert (square.reshape(-1, 3) == dark).all(-1).sum() == 255
    assert (height, width) == (27 + 2 * (side + 35) + 8, 2 * (side + 8) + 8)


def test_late_queries_of_a_causal_map_are_as_bright_as_early_ones():
    """Their weights are small because their keys are many."""
    even = torch.ones(1, 64, 64).tril() / torch.arange(1, 65).view(1, 64, 1)
    square = heatmaps("title", {"own": even})[54 : 54 + 256, 8 : 8 + 256][2::4, 2::4]
    visible = torch.ones(64, 64).tril().bool().numpy()
    assert (square[visible] == [252, 253, 191]).all()
    assert (square[~visible] == [0, 0, 4]).all()
