"""The model code that travels with an exported folder computes what longseq's own network does."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from longseq.attention.options import KERNELS, OPTIONS, SIGNED_KERNELS, AttentionOptions
from longseq.errors import LongseqError
from longseq.interop import performer_longseq, travelling
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from mixing import settle

SIZES = {"vocabulary": 29, "dim": 24, "depth": 2, "heads": 2, "ffn_dim": 40, "seed": 3, "redraw_every": 4}
STEP = 9  # its last step's projections are the third draw
LONG = 300  # three chunks

NETWORKS = {
    **{f"causal {kernel}": {"causal": True, "kernel": kernel} for kernel in KERNELS},
    **{f"masked {kernel}": {"causal": False, "kernel": kernel} for kernel in ("softmax", "cos", "oprf")},
    "causal window": {"causal": True, "window": 5, "learned_share": True, "learned_decay": True},
    "masked window": {"causal": False, "window": 5, "learned_share": True, "learned_decay": True},
    "masked decay": {"causal": False, "learned_decay": True, "kernel": "relu", "projection": "iid"},
    "window alone": {"causal": True, "window": 7, "features": 0},
    "exact": {"causal": True, "kind": "exact"},
    "exact decay": {"causal": False, "kind": "exact", "learned_decay": True},
    "BERT": {
        "causal": False, "kind": "exact", "position": "learned", "max_positions": 300, "norm": "post",
        "embedding_norm": True, "attention_bias": True, "head": "transform", "norm_eps": 1e-6,
    },
    "ESM": {"causal": False, "mask_scaling": True, "rotary_base": 50.0, "attention_bias": True},
    "modern": {
        "causal": True, "qk_norm": True, "norm_kind": "rmsnorm", "ffn": "swiglu", "bias": False, "conv": 4,
        "value_residual": True, "window": 6,
    },
    "modern masked": {"causal": False, "conv": 4, "value_residual": True, "ffn": "relu2"},
    "gates": {"causal": True, "forget_gate": True},
    "gates, window": {"causal": True, "forget_gate": True, "window": 5, "learned_share": True},
    "gates, masked": {"causal": False, "forget_gate": True},
    "gates, masked window": {"causal": False, "forget_gate": True, "window": 5, "features": 0},
    "gates, exact": {"causal": True, "kind": "exact", "forget_gate": True},
    "gates, masked exact": {"causal": False, "kind": "exact", "forget_gate": True},
    "learned covariance": {"causal": True, "learned_covariance": True, "window": 5},
    "masked aderf, learned covariance": {"causal": False, "kernel": "aderf", "learned_covariance": True},
    "plan": {
        "causal": True,
        "conv": 3,
        "layers": (AttentionOptions(window=4, features=10, learned_decay=True), AttentionOptions(kind="exact")),
    },
}  # fmt: skip


def pair(options):
    """longseq's network, with weights far from their first, and the one that travels."""
    spec = PerformerSpec(**{**SIZES, "features": 16, **options})
    torch.manual_seed(0)
    ours = PerformerLM(spec)
    for name, parameter in ours.named_parameters():
        parameter.data += (0.05 if "conv" in name else 0.3) * torch.randn_like(parameter)
    for name, buffer in ours.named_buffers():
        if name.endswith("oprf_constant"):
            buffer.fill_(-120_000_000)  # A = −0.12
    for block in ours.blocks:
        if block.attention.frame is not None:
            settle(block.attention.frame)
    ours.set_step(STEP - 1)
    config = SimpleNamespace(performer=travelling.performer(spec, STEP), vocab_size=29, mask_token_id=28)
    theirs = performer_longseq.Performer(config)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def batch(length=LONG):
    """Tokens, some of them masked, and a mask of rows that are padded in front."""
    tokens = torch.randint(29, (3, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones(3, length, dtype=torch.bool)
    real[0, : length // 3] = False
    real[1, :2] = False
    return tokens, real


def close(found, expected, tolerance=2e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_hidden_states_and_gradients_are_those_of_our_network(options):
    ours, theirs = pair(options)
    tokens, real = batch()
    signed = options.get("kernel") in SIGNED_KERNELS  # whose denominators cancel: there rounding is amplified
    for mask in (None, real):
        own: list[torch.Tensor] = []
        found: list[torch.Tensor] = []
        ours.hidden(tokens, mask, states=own)
        theirs.hidden(tokens, mask, states=found)
        assert len(own) == len(found) == 3
        keep = slice(None) if mask is None else mask
        for a, b in zip(own, found, strict=True):
            close(b[keep], a[keep], 5e-2 if signed else 2e-4)
    if signed:
        return
    scored = torch.where(real & (tokens % 2 == 0), tokens, -100)
    for network in (ours, theirs):
        logits = network.head(network.hidden(tokens, real))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), scored.flatten()).backward()
    wanted = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        expected = wanted[name].grad
        assert expected is not None, name
        close(parameter.grad / expected.abs().max(), expected / expected.abs().max(), 2e-3)


def test_a_gate_that_is_nan_is_not_taken_for_one_that_forgets_nothing():
    tokens, real = batch(40)
    for network in pair({"causal": True, "forget_gate": True}):
        with torch.no_grad():
            next(parameter for name, parameter in network.named_parameters() if "gate" in name).fill_(torch.nan)
            assert network.head(network.hidden(tokens, real))[real].isnan().all()


@pytest.mark.parametrize("name", [name for name, options in NETWORKS.items() if options["causal"]])
def test_a_prompt_and_what_follows_give_the_logits_of_the_whole(name):
    _, theirs = pair(NETWORKS[name])
    tokens, real = batch(150)
    tolerance = 5e-2 if NETWORKS[name].get("kernel") in SIGNED_KERNELS else 2e-4
    with torch.no_grad():
        whole = theirs.head(theirs.hidden(tokens, real))
        hidden, state = theirs.read(tokens[:, :140], real[:, :140])
        close(theirs.head(hidden)[real[:, :140]], whole[:, :140][real[:, :140]], tolerance)
        swapped = torch.tensor([2, 0, 0])
        for at in range(140, 150):
            logits, state = theirs.decode(tokens[:, at], state)
            close(logits, whole[:, at], tolerance)
            if at == 144:  # beams go on from another row
                state, tokens = state.select(swapped), tokens[swapped]
                whole = whole[swapped]


def test_operands_of_16_bits_are_multiplied_by_the_same_rows():
    ours, theirs = pair({"causal": True})
    tokens, _ = batch(90)
    with torch.no_grad():
        found, expected = (network.bfloat16().hidden(tokens).float() for network in (theirs, ours))
        exact = pair({"causal": True})[0].hidden(tokens)
    assert (found - expected).abs().mean() < 0.5 * (expected - exact).abs().mean()


def test_the_code_knows_the_fields_that_are_written_for_it():
    layer = {field.name for field in dataclasses.fields(performer_longseq.Layer)}
    sizes = {field.name for field in dataclasses.fields(performer_longseq.Sizes)}
    written = travelling.performer(PerformerSpec(causal=True, **SIZES), STEP)
    assert sizes == set(written)
    assert layer == set(written["layers"][0])
    with pytest.raises(TypeError, match="forget_gate"):
        performer_longseq.Sizes.of({**written, "forget_gate": True})


@dataclasses.dataclass(frozen=True)
class Newer(PerformerSpec):
    sort_of_norm: str = dataclasses.field(default="plain", kw_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewerOptions(AttentionOptions):
    gate: bool = False


def test_an_option_that_the_code_does_not_compute_is_refused_unless_it_is_off():
    plain = travelling.performer(PerformerSpec(causal=True, **SIZES), STEP)
    assert travelling.performer(Newer(causal=True, **SIZES), STEP) == plain
    with pytest.raises(LongseqError, match=r"^model\.sort_of_norm=other: the model code .* export with --no-code"):
        travelling.performer(Newer(causal=True, sort_of_norm="other", **SIZES), STEP)
    for gate in (False, True):
        options = {name: getattr(AttentionOptions(), name) for name in OPTIONS}
        spec = PerformerSpec(causal=True, layers=(NewerOptions(**options, gate=gate),), **SIZES)
        if gate:
            with pytest.raises(LongseqError, match=r"^attention\.gate=True"):
                travelling.performer(spec, STEP)
        else:
            assert travelling.performer(spec, STEP) == travelling.performer(
                PerformerSpec(causal=True, layers=(AttentionOptions(),), **SIZES), STEP
            )
