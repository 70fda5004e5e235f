"""FavorAttention as a module: whose weights it takes, what it learns, and what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from longseq.attention import FavorAttention, favor_attention, rotary_table
from longseq.attention.oprf import oprf_parameter

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, HEADS, LENGTH = 24, 3, 70


def build(**options: object) -> FavorAttention:
    """Weights at which queries select among keys; the same ones for the same options' shapes."""
    torch.manual_seed(0)
    module = FavorAttention(DIM, HEADS, **{"causal": True, "features": 16, **options})
    with torch.no_grad():
        module.qkv.weight.mul_(2)
    return module


def sample(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(length))


def rotary(length: int = LENGTH) -> Tensor:
    return rotary_table(torch.arange(length), DIM // HEADS)


# the weights of a plain Transformer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "bias": True}, {"learned_decay": True, "qk_norm": True}])
def test_weights_of_exact_attention_load_unchanged_and_back(causal, options):
    exact, x = build(kind="exact", causal=causal, **options), sample()
    favor = FavorAttention(DIM, HEADS, causal=causal, window=LENGTH, **options)
    favor.load_state_dict(exact.state_dict(), strict=True)
    with torch.no_grad():
        expected, out = exact(x, rotary=rotary()), favor(x, rotary=rotary())
    # A window as long as the sequence leaves nothing to approximate.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    back = FavorAttention(DIM, HEADS, causal=causal, kind="exact", **options)
    back.load_state_dict(favor.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(back(x, rotary=rotary()), expected)


def test_exact_attention_is_that_of_torch():
    """qkv and out are in_proj and out_proj of nn.MultiheadAttention."""
    theirs = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = build(causal=False, window=LENGTH, bias=True)
    ours.load_state_dict(
        {
            "qkv.weight": theirs.in_proj_weight,
            "qkv.bias": theirs.in_proj_bias,
            "out.weight": theirs.out_proj.weight,
            "out.bias": theirs.out_proj.bias,
        }
    )
    x, padding = sample(), torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, 50:] = False
    expected, _ = theirs(x, x, x, key_padding_mask=~padding, need_weights=False)
    torch.testing.assert_close(ours(x, padding=padding), expected, rtol=1e-5, atol=1e-5)


def test_more_features_come_closer_to_exact_attention():
    exact, x = build(kind="exact", qk_norm=True), sample()
    with torch.no_grad():
        expected = exact(x)
        errors = []
        for features in (16, 2048):
            favor = build(features=features, qk_norm=True)
            favor.load_state_dict(exact.state_dict())
            errors.append((favor(x) - expected).square().mean())
    assert errors[1] < errors[0] / 5


def test_projections_are_no_part_of_the_state_dict():
    assert build(window=7).state_dict().keys() == {"qkv.weight", "out.weight"}


def test_the_layer_and_the_draw_choose_the_projections():
    x, outs = sample(), []
    with torch.no_grad():
        for layer, draw in ((0, 0), (1, 0), (0, 1), (0, 0)):
            module = build(layer=layer)
            module.draw = draw
            outs.append(module(x))
    assert torch.equal(outs[0], outs[3])
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[1], outs[2])


# what it learns


@pytest.mark.parametrize("causal", [True, False])
def test_temperature_share_and_decay_get_gradients_as_functions_of_their_definition(causal):
    module = build(causal=causal, window=7, qk_norm=True, learned_share=True, learned_decay=True)
    x, direction = sample(), torch.randn(2, LENGTH, DIM)
    q, k, _ = module.project(x)
    assert q.norm(dim=-1).std() < 1e-5  # all of one length a head, as τ = 2 for all
    torch.testing.assert_close((q.norm(dim=-1) * k.norm(dim=-1)).mean(), torch.tensor(2.0 * (DIM // HEADS) ** 0.5))
    learned = {name: p for name, p in module.named_parameters() if name.startswith("log_")}
    assert learned.keys() == {"log_temperature", "log_share", "log_decay"}

    def loss() -> Tensor:
        return (module(x) * direction).sum()

    gradients = dict(zip(learned, torch.autograd.grad(loss(), list(learned.values())), strict=True))
    for name, parameter in learned.items():
        for head in range(HEADS):
            step = torch.zeros_like(parameter)
            step[head] = 0.02
            with torch.no_grad():
                parameter.add_(step)
                above = loss()
                parameter.sub_(2 * step)
                below = loss()
                parameter.add_(step)
            slope = (above - below) / 0.04
            torch.testing.assert_close(gradients[name][head].squeeze(), slope, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{"kind": "exact", "window": 8}, {"window": LENGTH}], ids=["exact", "window"])
def test_a_share_that_nothing_needs_gets_a_gradient_of_zero(options):
    module = build(learned_share=True, learned_decay=True, **options)
    module(sample()).square().sum().backward()
    assert module.log_share.grad.tolist() == [0] * HEADS
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_learned_numbers_are_absent_where_they_are_off():
    for options in ({}, {"window": 7}, {"learned_share": True}):  # without a window nothing is beyond it
        assert build(**options).state_dict().keys() == {"qkv.weight", "out.weight"}
    options = {"window": 7, "learned_share": True, "learned_decay": True, "qk_norm": True}
    assert build(**options).state_dict().keys() > {"log_share", "log_decay", "log_temperature"}


def test_the_module_is_its_projections_and_favor_attention():
    module, x = build(window=7, learned_share=True, learned_decay=True, qk_norm=True), sample()
    with torch.no_grad():
        module.log_share.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        q, k, v = module.project(x, rotary())
        mixed = favor_attention(
            q, k, v, causal=True, window=7, features=16, far_share=module.log_share, decay=module.log_decay.exp()
        )
        assert torch.equal(module(x, rotary=rotary()), module.out(mixed.transpose(1, 2).flatten(2)))


# OPRF's constant


def calibrated(x: Tensor, **options: object) -> FavorAttention:
    module = build(**{"kernel": "oprf", **options}).train()
    module(x)
    return module


def test_the_first_training_pass_fixes_the_constant_for_good():
    module, x = build(kernel="oprf"), sample()
    module.eval()(x)
    assert module.oprf_a is None  # evaluation before training decides nothing
    module.train()(x)
    q, k, _ = module.project(x)
    assert module.oprf_a == pytest.approx(oprf_parameter(q, k), abs=1e-9)
    assert module.oprf_a < -1e-3
    fixed = module.oprf_a
    module(3 * x)
    module.eval()(3 * x)
    assert module.oprf_a == fixed


def test_the_constant_is_used():
    x = sample()
    module = calibrated(x).eval()
    q, k, v = module.project(x)
    mixed = favor_attention(q, k, v, causal=True, kernel="oprf", features=16, oprf_a=module.oprf_a)
    assert torch.equal(module(x), module.out(mixed.transpose(1, 2).flatten(2)))
    assert module.call().oprf_a == module.oprf_a


def test_padding_does_not_enter_the_constant():
    x, padding = sample(), torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, 30:] = False
    other = x.clone()
    other[1, 30:] = 100.0
    constants = []
    for inputs in (x, other):
        module = build(kernel="oprf").train()
        module(inputs, padding=padding)
        constants.append(module.oprf_a)
    assert constants[0] == constants[1] != calibrated(x).oprf_a


def test_a_batch_of_padding_alone_leaves_the_constant_open():
    module, x = build(kernel="oprf").train(), sample()
    module(x, padding=torch.zeros(2, LENGTH, dtype=torch.bool))
    assert module.oprf_a is None
    module(x)
    assert module.oprf_a == calibrated(x).oprf_a


def test_the_constant_is_saved_and_loaded():
    trained, x = calibrated(sample()), sample()
    fresh = build(kernel="oprf").train()
    fresh.load_state_dict(trained.state_dict(), strict=True)
    fresh(3 * x)
    assert fresh.oprf_a == trained.oprf_a
    with torch.no_grad():
        assert torch.equal(fresh(x), trained(x))
    # Also into a module that has one of its own.
    other = calibrated(3 * x)
    assert other.oprf_a != trained.oprf_a
    other.load_state_dict(trained.state_dict())
    assert other.oprf_a == trained.oprf_a


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_constant_survives_half_precision_and_copies(dtype):
    module = calibrated(sample())
    fixed = module.oprf_a
    halved = copy.deepcopy(module).to(dtype)
    assert halved.oprf_a == fixed
    fresh = build(kernel="oprf").to(dtype)
    fresh.load_state_dict(halved.state_dict())
    assert fresh.oprf_a == fixed


def test_oprf_and_softmax_exchange_their_checkpoints():
    x = sample()
    oprf, softmax = calibrated(x), build()
    saved = oprf.state_dict()
    softmax.load_state_dict(saved, strict=True)
    assert "oprf_constant" in saved  # the caller's dictionary is left alone
    assert "oprf_constant" not in softmax.state_dict()
    oprf.load_state_dict(softmax.state_dict(), strict=True)
    assert oprf.oprf_a is None  # to be fixed at the first training step here
    oprf.train()(x)
    assert oprf.oprf_a == calibrated(x).oprf_a
    exact = build(kernel="oprf", kind="exact")
    exact.load_state_dict(saved, strict=True)
    nested = torch.nn.ModuleDict({"layer": build()})
    nested.load_state_dict({f"layer.{name}": tensor for name, tensor in saved.items()}, strict=True)


# precision


@pytest.mark.parametrize("kernel", ["softmax", "relu", "oprf"])
@pytest.mark.parametrize("window", [0, 7])
def test_bf16_autocast_stays_close_to_fp32(kernel, window):
    # ReLU's features look at directions only: without a window, the gradient of a temperature is rounding.
    learned = {"learned_decay": True, "learned_share": True, "qk_norm": kernel != "relu"}
    options = {"kernel": kernel, "window": window, **learned}
    wanted, cast, x = build(**options).train(), build(**options).train(), sample()
    direction = torch.randn(2, LENGTH, DIM)
    expected = wanted(x, rotary=rotary())
    (expected * direction).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cast(x, rotary=rotary())
    (out * direction).sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
    for (name, parameter), reference in zip(cast.named_parameters(), wanted.parameters(), strict=True):
        assert (parameter.grad - reference.grad).norm() < 0.05 * reference.grad.norm(), name


# packed documents


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 7},
        {"kind": "exact"},
        {"kernel": "relu"},
        {"window": 7, "learned_decay": True, "learned_share": True, "qk_norm": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "softmax",
)
def test_packed_documents_are_as_if_alone(causal, options):
    module, x, lengths = build(causal=causal, **options), sample(), (1, 40, 8, 21)
    segments = torch.repeat_interleave(torch.tensor([4, 2, 4, 0]), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        packed = module(x, segments=segments, rotary=rotary_table(positions, DIM // HEADS))
        alone = [module(part, rotary=rotary(part.shape[1])) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"kind": "exact"}])
def test_gradients_do_not_cross_from_one_document_into_another(options):
    x = sample().requires_grad_()
    segments = (torch.arange(LENGTH) >= 33).long().expand(2, -1)
    build(causal=False, **options)(x, segments=segments, rotary=rotary())[:, :33].sum().backward()
    assert torch.all(x.grad[:, 33:] == 0)
    assert torch.all(x.grad[:, :33].abs().amax(-1) > 0)


# decoding


@pytest.mark.parametrize("options", [{}, {"window": 7, "learned_share": True}, {"kind": "exact"}, {"kernel": "oprf"}])
def test_prefill_and_decode_are_the_forward_pass_in_parts(options):
    module, x = calibrated(sample(), **options) if "kernel" in options else build(**options), sample()
    expected = module.eval()(x, rotary=rotary()).detach()
    out, state = module.prefill(x[:, :33], rotary=rotary()[:, :33])
    outs = [out]
    for at in (slice(33, 34), slice(34, 35), slice(35, LENGTH)):
        out, state = module.decode(x[:, at], state, rotary=rotary()[:, at])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-5, atol=1e-5)


# errors


def test_sizes_and_kinds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="dim=24 is not divisible by heads=5"):
        FavorAttention(24, 5)
    with pytest.raises(ValueError, match="unknown kind 'softmax'; the kinds are favor, exact"):
        FavorAttention(24, 3, kind="softmax")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel": "sotfmax"}, "unknown kernel 'sotfmax'"),
        ({"kernel": "tanh", "window": 3}, "both signs"),
        ({"window": -1}, "window must be"),
        ({"projection": "normal"}, "unknown projection"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_options_that_attention_refuses_are_refused_in_the_first_pass(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**options)(sample())


def test_bidirectional_attention_cannot_be_decoded():
    for kind in ("favor", "exact"):
        with pytest.raises(ValueError, match="bidirectional"):
            build(causal=False, kind=kind).prefill(sample())
