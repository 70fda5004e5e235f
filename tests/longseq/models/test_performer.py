"""The Performer language model: what its logits may depend on, and what must make no difference to them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.rotary import rotary_table, rotate
from longseq.models.performer import PerformerLM
from longseq.models.presets import PRESETS
from longseq.models.spec import PerformerSpec
from mixing import MODERN, mix

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 11
SPEC = PerformerSpec(vocabulary=VOCABULARY, dim=24, depth=2, heads=3, ffn_dim=20, causal=True, features=16)
LENGTH = 131  # one chunk of the causal scan and a bit

attentions = pytest.mark.parametrize(
    "attention",
    [
        {"kind": "exact"},
        {"kernel": "softmax"},
        {"kernel": "relu"},
        {"conv": 4, "value_residual": True, "ffn": "swiglu", "norm_kind": "rmsnorm", "bias": False},
    ],
    ids=["exact", "softmax", "relu", "modern"],
)
normed = pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])


def build(spec: PerformerSpec, enlarge: float = 15) -> PerformerLM:
    """A model in evaluation mode whose attention selects: at its initial size it would average over all keys."""
    torch.manual_seed(1)
    model = PerformerLM(spec).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(enlarge)
            block.attention.out.weight.mul_(enlarge)
    return mix(model)


def sample(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


# size


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, qk_norm=True),
        replace(SPEC, causal=False, kind="exact"),
        replace(SPEC, **MODERN),
        replace(SPEC, ffn="swiglu"),
        replace(SPEC, ffn="relu2", bias=False, embedding_norm=True),
        replace(SPEC, norm_kind="rmsnorm", norm="post", conv=3),
        PerformerSpec(vocabulary=29, dim=10, depth=1, heads=5, ffn_dim=7, causal=True),
        *(
            PerformerSpec(29, size.dim, size.depth, size.heads, size.ffn_dim, causal=True, qk_norm=True)
            for size in PRESETS.values()
        ),
    ],
)
def test_a_spec_counts_the_weights_of_its_model(spec):
    with torch.device("meta"):
        model = PerformerLM(spec)
    assert spec.parameter_count == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("dim", "heads", "sentence"), [(10, 3, "not divisible"), (15, 3, "is odd")])
def test_sizes_that_do_not_fit_are_refused(dim, heads, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SPEC, dim=dim, heads=heads)


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    model = PerformerLM(replace(SPEC, dim=48, heads=4))
    tokens = sample()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, dims=1).flatten())
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.05)


# what the logits depend on


@attentions
@normed
@pytest.mark.parametrize("position", [1, 128, 130])
def test_causal_logits_ignore_later_tokens_to_the_last_bit(attention, qk_norm, position):
    model, tokens = build(replace(SPEC, qk_norm=qk_norm, **attention)), sample()
    changed = tokens.clone()
    changed[:, position:] = (changed[:, position:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] - after[:, position:]).abs().amax(dim=-1).min() > 1e-3


@attentions
@normed
def test_masked_logits_depend_on_both_sides(attention, qk_norm):
    model, tokens = build(replace(SPEC, causal=False, qk_norm=qk_norm, **attention)), sample(9)
    for changed_at in (0, 8):
        changed = tokens.clone()
        changed[:, changed_at] = (changed[:, changed_at] + 1) % VOCABULARY
        with torch.no_grad():
            difference = (model(tokens) - model(changed)).abs().amax(dim=-1)
        assert difference.min() > 1e-5


@attentions
@normed
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_padding_changes_no_real_position(attention, qk_norm, causal):
    model, tokens = build(replace(SPEC, causal=causal, qk_norm=qk_norm, **attention)), sample()
    real = 77
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[1, real:] = False
    other = tokens.clone()
    other[1, real:] = (other[1, real:] + 3) % VOCABULARY
    with torch.no_grad():
        padded, repadded, alone = model(tokens, padding), model(other, padding), model(tokens[1:, :real])
        unpadded = model(tokens)
    assert torch.equal(padded[1, :real], repadded[1, :real])
    torch.testing.assert_close(padded[1:, :real], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[0], unpadded[0], rtol=1e-4, atol=1e-5)


@attentions
@pytest.mark.parametrize("options", [{}, {"window": 7, "learned_decay": True}], ids=["plain", "window"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_packed_documents_are_as_if_alone(attention, options, causal):
    """Also where features are random: those of a rotated vector depend on where in the row it stands."""
    model, tokens = build(replace(SPEC, causal=causal, **attention, **options)), sample()
    documents = [(10, 80, 41), (1, 2, 128)]
    segments = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)) for sizes in documents])
    with torch.no_grad():
        packed = model(tokens, segments=segments)
        for row, sizes in enumerate(documents):
            alone = [model(part) for part in tokens[row : row + 1].split(sizes, dim=1)]
            torch.testing.assert_close(packed[row : row + 1], torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@attentions
def test_a_row_padded_in_front_is_as_if_alone(attention):
    model, tokens = build(replace(SPEC, **attention)), sample()
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[1, :50] = False
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, padding)[1:, 50:], model(tokens[1:, 50:]), rtol=1e-4, atol=1e-5)


@attentions
def test_positions_are_told_apart(attention):
    """Without rotary positions, a token after two others would not know their order."""
    model = build(replace(SPEC, depth=1, **attention))
    with torch.no_grad():
        one, other = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert (one - other).abs().max() > 1e-3


@attentions
def test_qk_norm_makes_the_length_of_queries_and_keys_irrelevant(attention):
    model, tokens = build(replace(SPEC, qk_norm=True, **attention)), sample(30)
    with torch.no_grad():
        before = model(tokens)
        for block in model.blocks:
            block.attention.qkv.weight[: 2 * SPEC.dim].mul_(7)
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-5)
        model.blocks[0].attention.log_temperature.add_(1)
        sharper = (model(tokens) - before).abs().max()
    if model.spec.kernel == "relu":
        assert sharper < 1e-2  # that kernel looks at directions only
    else:
        assert sharper > 1e-2


# what makes no difference


@normed
def test_exact_and_favor_exchange_their_weights_and_agree_with_many_features(qk_norm):
    exact = build(replace(SPEC, kind="exact", qk_norm=qk_norm), enlarge=8)
    average = build(exact.spec, enlarge=8)
    tokens = sample(40)
    with torch.no_grad():
        for block in average.blocks:
            block.attention.qkv.weight[: SPEC.dim] = 0  # queries that do not select
        wanted = exact(tokens)
        errors = [(average(tokens) - wanted).square().mean().item()]
        for features in (16, 4096):
            favor = PerformerLM(replace(SPEC, features=features, qk_norm=qk_norm)).eval()
            favor.load_state_dict(exact.state_dict(), strict=True)
            errors.append((favor(tokens) - wanted).square().mean().item())
    assert errors[2] < errors[1] / 5
    assert errors[2] < errors[0] / 5


@attentions
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(attention, dropout):
    spec, tokens = replace(SPEC, dropout=dropout, **attention), sample()
    found = []
    for recompute, offload in ((False, False), (True, False), (True, True)):
        model = build(replace(spec, activation_checkpointing=recompute, activation_offload=offload)).train()
        torch.manual_seed(7)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, dims=1).flatten())
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=0)
    assert all(gradient.abs().max() > 0 for gradient in found[1][1].values())


def test_dropout_is_a_function_of_the_seed_and_absent_in_evaluation():
    model, tokens = build(replace(SPEC, dropout=0.3)), sample(20)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        outputs = []
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            outputs.append(model.train()(tokens))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@attentions
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_a_bf16_model_stays_close_to_the_fp32_one(attention, causal):
    model, tokens = build(replace(SPEC, causal=causal, qk_norm=True, **attention)), sample()
    with torch.no_grad():
        wanted = model(tokens)
        logits = model.bfloat16()(tokens)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert (logits.float() - wanted).square().mean() < 0.01 * wanted.var()


# projections


def logits_at(model: PerformerLM, step: int) -> Tensor:
    model.set_step(step)
    with torch.no_grad():
        return model(sample(12))


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_projections_change_every_redraw_every_steps_and_at_no_other(kernel):
    model = build(replace(SPEC, kernel=kernel, redraw_every=3))
    logits = [logits_at(model, step) for step in range(10)]
    changes = [step for step in range(1, 10) if not torch.equal(logits[step - 1], logits[step])]
    assert changes == [3, 6, 9]
    assert not torch.equal(logits[0], logits[9])
    assert torch.equal(logits_at(model, 4), logits[4])  # a function of the step, not of what came before


def test_without_redrawing_projections_stay():
    model = build(replace(SPEC, redraw_every=0))
    assert torch.equal(logits_at(model, 0), logits_at(model, 10**6))


def test_every_layer_and_every_seed_has_projections_of_its_own():
    model, other = build(SPEC), build(replace(SPEC, seed=1))
    assert not torch.equal(logits_at(model, 0), logits_at(other, 0))
    with torch.no_grad():
        before = logits_at(model, 0)
        model.blocks[1].attention.layer = 0
        assert not torch.equal(logits_at(model, 0), before)


def test_projections_are_no_part_of_the_weights():
    assert not list(build(SPEC).buffers())
    assert build(SPEC).state_dict().keys() == build(replace(SPEC, kind="exact")).state_dict().keys()


# rotary positions


@pytest.mark.parametrize("base", [10_000.0, 1e7])
def test_rotation_is_a_multiplication_by_complex_units(base):
    x = torch.randn(1, 2, 9, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 3, 5, 8, 13, 100, 2**20])
    a, b = x.double().chunk(2, dim=-1)
    frequencies = base ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(a, b) * torch.polar(torch.ones(9, 3, dtype=torch.float64), positions[:, None] * frequencies)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    rotated = rotate(x, rotary_table(positions, 6, base))
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_rotated_products_depend_on_the_distance_alone():
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=rng) for _ in range(2))

    def product(of_query: int, of_key: int) -> float:
        turned = (rotate(x, rotary_table(torch.tensor([at]), 16)) for x, at in ((q, of_query), (k, of_key)))
        return math.prod(turned).sum().item()

    for distance in (0, 1, 7, 50):
        products = [product(start + distance, start) for start in (0, 3, 200, 10**6)]
        assert products == pytest.approx([products[0]] * 4, abs=1e-5)
    assert abs(product(1, 0) - product(7, 0)) > 0.1
    assert abs(product(7, 0) - product(0, 7)) > 0.1


def test_rotation_keeps_the_dtype():
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert rotate(x, rotary_table(torch.arange(3), 4)).dtype == torch.bfloat16
