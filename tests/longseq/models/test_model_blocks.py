"""What a block is made of: each part against its formula, and a whole model's size, neighbours and memory of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.convolution import ShortConvolution
from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.measure.model_flops import training_flops
from longseq.models.mlp import mlp
from longseq.models.norm import norm
from longseq.models.performer import PerformerLM
from longseq.models.presets import BLOCKS, PRESETS
from longseq.models.spec import PerformerSpec
from mixing import MODERN, mix

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = PerformerSpec(vocabulary=11, dim=24, depth=3, heads=3, ffn_dim=20, causal=True, features=16)
F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# norms and MLPs


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_rmsnorm_is_its_formula_with_its_gradients(dtype):
    layer, x, branch = norm(12, 1e-3, "rmsnorm").to(F64), numbers(3, 5, 12), numbers(3, 5, 12, seed=1)
    with torch.no_grad():
        layer.weight.copy_(numbers(12, seed=2))
    layer, x, branch = layer.to(dtype), x.to(dtype).requires_grad_(), branch.to(dtype).requires_grad_()
    total, normed = layer(x, branch)
    wide = [t.detach().double().requires_grad_() for t in (total, layer.weight)]
    wanted = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-3).sqrt() * wide[1]
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == F64 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(normed.double(), wanted, **tolerance)
    grad = numbers(3, 5, 12, seed=3)
    dx, d_weight = torch.autograd.grad(wanted, wide, grad)
    found = torch.autograd.grad(normed, (x, branch, layer.weight), grad.to(dtype))
    for one, other in zip(found, (dx, dx, d_weight), strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_an_mlp_is_its_formula_with_its_gradients(kind):
    layer = mlp(6, 5, kind, bias=False).double()
    x, grad = numbers(4, 6).requires_grad_(), numbers(4, 6, seed=1)
    wide = x @ layer[0].weight.mT
    if kind == "swiglu":
        value, gate = wide.chunk(2, dim=-1)
        middle = value * gate / (1 + torch.exp(-gate))
    else:
        middle = torch.where(wide > 0, wide**2, 0.0)
    wanted = middle @ layer[2].weight.mT
    learned = [x, layer[0].weight, layer[2].weight]
    torch.testing.assert_close(layer(x), wanted)
    expected = torch.autograd.grad(wanted, learned, grad)
    torch.testing.assert_close(torch.autograd.grad(layer(x), learned, grad), expected)


# the convolution


@pytest.mark.parametrize(("width", "causal"), [(4, True), (2, True), (5, False), (4, False), (40, True)])
def test_the_convolution_is_torchs_with_its_gradients(width, causal):
    layer, x = ShortConvolution(6, width, causal).double(), numbers(2, 17, 6).requires_grad_()
    assert torch.equal(layer(x), x)  # at the beginning it changes nothing
    with torch.no_grad():
        layer.weight.copy_(numbers(6, 1, width, seed=1))
    before = width - 1 if causal else width // 2
    wanted = F.conv1d(F.pad(x.mT, (before, width - 1 - before)), layer.weight, groups=6).mT
    grad = numbers(2, 17, 6, seed=2)
    torch.testing.assert_close(layer(x), wanted)
    expected = torch.autograd.grad(wanted, (x, layer.weight), grad)
    torch.testing.assert_close(torch.autograd.grad(layer(x), (x, layer.weight), grad), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_convolved_as_if_alone_and_a_number_may_come_twice(causal):
    layer, x = ShortConvolution(4, 5, causal).double(), numbers(1, 14, 4).requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(numbers(4, 1, 5, seed=1))
    sizes = (2, 1, 7, 4)
    segments = torch.repeat_interleave(torch.tensor([3, 8, 3, 5]), torch.tensor(sizes))[None]
    wanted = torch.cat([layer(part) for part in x.split(sizes, dim=1)], dim=1)
    grad = numbers(1, 14, 4, seed=2)
    torch.testing.assert_close(layer(x, segments=segments), wanted)
    expected = torch.autograd.grad(wanted, (x, layer.weight), grad)
    found = torch.autograd.grad(layer(x, segments=segments), (x, layer.weight), grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_of_padding_or_another_document_gets_in_not_even_nan(causal):
    layer, x = ShortConvolution(4, 3, causal), numbers(1, 9, 4).float()
    torch.nn.init.normal_(layer.weight)
    spoilt = x.clone()
    spoilt[:, 5:] = torch.nan
    real = (torch.arange(9) < 5)[None]
    assert torch.equal(layer(spoilt, padding=real)[:, :5], layer(x[:, :5]))
    assert torch.equal(layer(spoilt, segments=(~real).long())[:, :5], layer(x[:, :5]))


# models


def test_values_of_the_first_layer_are_mixed_into_later_ones_in_learned_shares():
    model = mix(PerformerLM(replace(SPEC, value_residual=True, kind="exact"))).eval()
    seen = []
    for block in model.blocks:
        attention = block.attention

        def look(q, k, v, *rest, attention=attention):
            seen.append(v)
            return type(attention).mix(attention, q, k, v, *rest)

        attention.mix = look
    tokens, plain = torch.arange(7)[None], []
    hooks = [b.attention.qkv.register_forward_hook(lambda m, i, out: plain.append(out)) for b in model.blocks]
    model(tokens)
    for hook in hooks:
        hook.remove()
    values = [out[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2) for out in plain]
    torch.testing.assert_close(seen[0], values[0])
    assert model.blocks[0].attention.value_mix is None
    for layer in (1, 2):
        share = model.blocks[layer].attention.value_mix
        torch.testing.assert_close(seen[layer], (1 - share) * values[layer] + share * values[0])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [("model.ffn=swiglu",), ("model.block=modern",)], ids=str)
def test_a_modern_model_has_the_weights_of_a_classic_one_within_two_percent(folder, preset, options):
    def count(*overrides: str) -> int:
        return load_config("small.yaml", [*_plain(preset), *overrides]).performer_spec(256).parameter_count

    assert count(*options) == pytest.approx(count(), rel=0.02)


def _plain(preset: str) -> list[str]:
    sizes = PRESETS[preset]
    names = ("dim", "depth", "heads", "ffn_dim")
    return ["data.train=proteins.fasta", *(f"model.{name}={getattr(sizes, name)}" for name in names)]


@pytest.mark.parametrize("ffn_dim", [64, 100, 383, 384, 512, 1000, 4096])
def test_swiglu_keeps_the_weights_of_the_mlp_at_any_width(ffn_dim):
    plain = replace(SPEC, dim=256, heads=4, ffn_dim=ffn_dim, bias=False)
    one, other = (sum(p.numel() for p in mlp(256, s.hidden, s.ffn, False).parameters()) for s in
                  (plain, replace(plain, ffn="swiglu")))  # fmt: skip
    assert other == pytest.approx(one, rel=0.02)


def test_a_block_is_its_recipe_where_no_key_says_otherwise():
    config = Config()
    assert config.block == BLOCKS["classic"]
    config.model.block = "modern"
    assert config.block == BLOCKS["modern"]
    config.model.conv, config.model.bias = 0, True
    config.attention = replace(config.attention, qk_norm=False)
    assert config.block == replace(BLOCKS["modern"], conv=0, bias=True, qk_norm=False)
    spec = config.performer_spec(29)
    assert (spec.norm_kind, spec.ffn, spec.bias, spec.conv, spec.qk_norm) == ("rmsnorm", "swiglu", True, 0, False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"conv": 1}, "model.conv=1 sees one position"),
        ({"bias": False, "attention_bias": True}, "contradict each other"),
    ],
)
def test_blocks_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SPEC, **options)


def test_flops_count_three_matrices_and_every_tap():
    plain = replace(SPEC, ffn_dim=30)
    assert replace(plain, ffn="swiglu").hidden == 20
    assert training_flops(replace(plain, ffn="swiglu"), 64) == training_flops(plain, 64)
    more = training_flops(replace(plain, conv=4), 64) - training_flops(plain, 64)
    assert more == 6 * SPEC.depth * 3 * SPEC.dim * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_stay_close(dtype):
    model = mix(PerformerLM(replace(SPEC, **MODERN)))
    tokens = torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            cast = model(tokens).float()
        low = model.to(dtype)(tokens).float()
    for found in (cast, low):
        assert (found - wanted).square().mean() < 0.01 * wanted.var()
