"""A plan of layers: a model of several kinds of attention against its composition in plain PyTorch, and its sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.options import AttentionOptions
from longseq.attention.projections import projection_matrix
from longseq.measure import flops
from longseq.measure.model_flops import training_flops
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

pytestmark = pytest.mark.usefixtures("one_thread")

FAVOR, EXACT = AttentionOptions(features=12), AttentionOptions(kind="exact")
SPEC = PerformerSpec(
    vocabulary=11, dim=12, depth=2, heads=3, ffn_dim=20, causal=True, position="learned", max_positions=40,
    layers=(FAVOR, EXACT),
)  # fmt: skip


def favor(q: Tensor, k: Tensor, layer: int) -> Tensor:
    """Weights of the positive features of the softmax kernel (arXiv 2009.14794, Lemma 1), written out."""
    omega = projection_matrix(12, 4, layer=layer, dtype=torch.float64)
    q, k = (x / 4**0.25 for x in (q, k))
    phi_q, phi_k = ((x @ omega.T - x.square().sum(-1, keepdim=True) / 2).exp() for x in (q, k))
    return phi_q @ phi_k.mT


def exact(q: Tensor, k: Tensor, layer: int) -> Tensor:
    return (q @ k.mT / 4**0.5).exp()


def composed(model: PerformerLM, tokens: Tensor, weights, segments: Tensor | None = None) -> Tensor:
    """Logits by operations of torch and the model's numbers alone; weights: a function a layer."""
    p = dict(model.named_parameters())
    positions, visible = torch.arange(tokens.shape[1]), torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).bool()
    if model.spec.causal:
        visible = visible.tril()
    if segments is not None:
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
        positions = positions - torch.searchsorted(segments, segments)  # rising numbers
    x = p["embedding.weight"][tokens] + p["positions.weight"][positions]
    for n, weigh in enumerate(weights):
        b = f"blocks.{n}."
        h = F.layer_norm(x, (12,), p[b + "attention_norm.weight"], p[b + "attention_norm.bias"])
        q, k, v = (h @ p[b + "attention.qkv.weight"].T).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        w = weigh(q, k, n) * visible
        mixed = ((w / w.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ p[b + "attention.out.weight"].T
        h = F.layer_norm(x, (12,), p[b + "mlp_norm.weight"], p[b + "mlp_norm.bias"])
        h = F.gelu(h @ p[b + "mlp.0.weight"].T + p[b + "mlp.0.bias"])
        x = x + h @ p[b + "mlp.2.weight"].T + p[b + "mlp.2.bias"]
    return F.layer_norm(x, (12,), p["norm.weight"], p["norm.bias"]) @ p["head.weight"].T


def build(spec: PerformerSpec) -> PerformerLM:
    torch.manual_seed(0)
    model = PerformerLM(spec).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(25)  # attention that selects, and matters next to the residual stream
            elif name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("depth", [2, 3])
def test_a_plan_is_its_layers_one_after_the_other_with_their_gradients(causal, packed, depth):
    model = build(replace(SPEC, causal=causal, depth=depth))
    tokens = torch.randint(11, (2, 37), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(37) // 15).expand(2, -1).contiguous() if packed else None
    wanted = composed(model, tokens, [favor, exact, favor][:depth], segments)
    found = model(tokens, segments=segments)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    other = composed(model, tokens, [exact, favor, exact][:depth], segments)
    assert (other - wanted).abs().max() > 0.1  # which layer is which is seen
    learned = list(model.parameters())
    targets = tokens.roll(-1, 1)
    losses = (F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in (found, wanted))
    mine, theirs = (torch.autograd.grad(loss, learned) for loss in losses)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_plan_of_one_kind_is_a_model_without_a_plan_to_the_last_bit():
    tokens = torch.randint(11, (2, 37), generator=torch.Generator().manual_seed(1))
    for options in (AttentionOptions(features=12, window=5), AttentionOptions(kind="exact", learned_decay=True)):
        alike = replace(SPEC, layers=(), **{name: of for name, of in vars(options).items() if name != "redraw_every"})
        torch.manual_seed(3)
        wanted = PerformerLM(alike)
        torch.manual_seed(3)
        found = PerformerLM(replace(SPEC, layers=(options,)))
        assert torch.equal(found(tokens), wanted(tokens))
        assert found.spec.parameter_count == wanted.spec.parameter_count
        assert training_flops(found.spec, 64) == training_flops(wanted.spec, 64)


def test_layers_of_all_kinds_learn_from_one_state_dict():
    model = build(SPEC)
    other = PerformerLM(replace(SPEC, layers=(EXACT, FAVOR))).double()
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(11)[None]
    torch.testing.assert_close(other(tokens), composed(model, tokens, [exact, favor]), rtol=1e-8, atol=1e-8)


def test_weights_and_flops_are_those_of_each_layer():
    own = AttentionOptions(features=7, window=9, learned_share=True)
    decays = replace(EXACT, learned_decay=True)
    spec = replace(SPEC, depth=5, layers=(own, decays, replace(own, features=0, learned_share=False)))
    model = PerformerLM(spec)
    assert spec.parameter_count == sum(p.numel() for p in model.parameters())
    assert [block.attention.options.kind for block in model.blocks] == ["favor", "exact", "favor", "favor", "exact"]
    plain = replace(spec, layers=())
    ours = training_flops(spec, 64) - training_flops(replace(plain, kind="exact"), 64)
    per_head = [flops.attention(o, 4, 64, causal=True, chunk=64).both.strict for o in (own, decays, spec.layers[2])]
    assert ours == pytest.approx(3 * (2 * per_head[0] + per_head[2] - 3 * per_head[1]))
    near = 9 - 9 * 8 / (2 * 64)  # keys within 9 positions, of 64 queries; beyond them nothing is seen
    assert per_head[2] == 3 * 2 * near * (4 + 4)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ((FAVOR, replace(FAVOR, kernel="hyperbolic", features=7)), r"attention\.layers\[1\]\.features=7 is odd"),
        ((replace(FAVOR, learned_share=True), EXACT), r"attention\.layers\[0\]\.learned_share=true has no effect"),
        ((FAVOR, EXACT, FAVOR), r"attention\.layers has 3 layers and the model has 2 \(model\.depth\)"),
        ((replace(FAVOR, features=0), EXACT), r"attention\.layers\[0\]\.features must be an integer from 1"),
    ],
)
def test_layers_that_cannot_be_are_refused_by_their_number(layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SPEC, layers=layers)


def test_what_is_said_of_layers_says_of_which():
    spec = replace(SPEC, depth=5, layers=(FAVOR, FAVOR, EXACT))
    assert spec.in_words(lambda layer: layer.kind) == "layers 0, 1, 3, 4: favor; layer 2: exact"
    assert replace(spec, layers=()).in_words(lambda layer: layer.kind) == "favor"
