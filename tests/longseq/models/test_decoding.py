"""A causal language model, one token at a time: the logits of the forward pass, at any kind of attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longseq.attention.options import AttentionOptions
from longseq.errors import LongseqError
from longseq.models import decoding
from longseq.models.decoding import Decoder
from longseq.models.performer import DecodingState, PerformerLM
from longseq.models.spec import PerformerSpec
from mixing import MODERN, mix

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = PerformerSpec(vocabulary=11, dim=24, depth=3, heads=3, ffn_dim=20, causal=True, features=16)
LENGTH = 201
# A window with features, exact attention, a window alone.
PLAN = (AttentionOptions(window=7, features=8), AttentionOptions(kind="exact"), AttentionOptions(window=5, features=0))

attentions = pytest.mark.parametrize(
    "attention",
    [
        {},
        {"window": 7},
        {"window": 64, "qk_norm": True, "learned_share": True, "learned_decay": True},
        {"window": 300},
        {"window": 7, "features": 0},
        {"learned_decay": True},
        {"kernel": "relu", "rotary_base": 1e9},
        {"kernel": "oprf", "window": 7},
        {"kernel": "aderf", "window": 7},
        {"kernel": "sderf", "learned_covariance": True},
        {"kind": "exact", "qk_norm": True},
        {"kind": "exact", "learned_decay": True},
        {"forget_gate": True},
        {"window": 7, "forget_gate": True, **MODERN},
        {"kind": "exact", "forget_gate": True},
        {"window": 7, **MODERN},
        {"kind": "exact", "conv": 3, "ffn": "relu2"},
        {"layers": PLAN},
        {"value_residual": True, "kind": "exact"},
        {
            "position": "learned",
            "max_positions": 300,
            "norm": "post",
            "embedding_norm": True,
            "attention_bias": True,
            "head": "transform",
        },
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "softmax",
)


def build(**options: object) -> PerformerLM:
    """A model in evaluation mode whose attention selects, and matters beside the residual stream."""
    torch.manual_seed(1)
    model = PerformerLM(replace(SPEC, **options)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight.mul_(10)
            block.attention.out.weight.mul_(10)
    return mix(model)


def sample(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randint(SPEC.vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def decoded(model: PerformerLM, tokens: Tensor, state: DecodingState) -> tuple[Tensor, DecodingState]:
    logits = []
    for token in tokens.unbind(1):
        token_logits, state = model.decode(token, state)
        logits.append(token_logits)
    return torch.stack(logits, dim=1), state


def agree(logits: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the logits' size."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@attentions
@pytest.mark.parametrize("prompt", [0, 1, 67])
def test_decoded_logits_are_those_of_the_forward_pass(attention, prompt):
    model, tokens = build(**attention), sample()
    with torch.no_grad():
        expected = model(tokens)
    first, state = model.prefill(tokens[:, :prompt])
    rest, state = decoded(model, tokens[:, prompt:], state)
    agree(torch.cat((first, rest), dim=1), expected)
    assert state.positions.tolist() == [LENGTH, LENGTH]


@attentions
def test_prompts_of_several_lengths_are_padded_in_front(attention):
    model, tokens = build(**attention), sample(40)
    padding = torch.ones(2, 30, dtype=torch.bool)
    padding[1, :13] = False
    first, state = model.prefill(tokens[:, :30], padding)
    rest, _ = decoded(model, tokens[:, 30:], state)
    with torch.no_grad():
        alone = model(tokens[1:, 13:])
    agree(torch.cat((first, rest), dim=1)[1:, 13:], alone)


@pytest.mark.parametrize("kind", ["favor", "exact"])
def test_two_continuations_of_one_prompt_do_not_disturb_each_other(kind):
    model, tokens = build(kind=kind, window=7), sample(60)
    _, state = model.prefill(tokens[:, :30])
    swapped = tokens[:, 30:].flip(0)
    one, _ = decoded(model, tokens[:, 30:], state)
    other, _ = decoded(model, swapped, state)
    again, _ = decoded(model, tokens[:, 30:], state)
    assert torch.equal(one, again)
    with torch.no_grad():
        agree(other, model(torch.cat((tokens[:, :30], swapped), dim=1))[:, 30:])


def test_many_continuations_share_one_prompt():
    model, tokens = build(window=7), sample(30, batch=1)
    _, state = model.prefill(tokens)
    nexts = torch.arange(5)
    logits, _ = model.decode(nexts, state.select(torch.zeros(5, dtype=torch.long)))
    with torch.no_grad():
        expected = model(torch.cat((tokens.expand(5, -1), nexts[:, None]), dim=1))[:, -1]
    agree(logits, expected)


def test_only_the_last_logits_of_a_prompt_are_made_on_demand():
    model, tokens = build(window=7), sample(30)
    every, _ = model.prefill(tokens)
    last, state = model.prefill(tokens, last_only=True)
    agree(last, every[:, -1:])
    agree(model.decode(tokens[:, 0], state)[0], decoded(model, tokens[:, :1], state)[0][:, 0])


def test_a_state_goes_on_with_the_projections_it_was_made_with():
    """Otherwise keys of one draw would meet queries of another."""
    model, tokens = build(redraw_every=1), sample(60)
    with torch.no_grad():
        expected = model(tokens)
    _, state = model.prefill(tokens[:, :30])
    model.set_step(5)
    agree(decoded(model, tokens[:, 30:], state)[0], expected[:, 30:])


def test_a_bf16_model_decodes_close_to_fp32():
    model, tokens = build(window=7, qk_norm=True), sample(60)
    with torch.no_grad():
        expected = model(tokens)
    model.bfloat16()
    _, state = model.prefill(tokens[:, :30])
    logits, _ = decoded(model, tokens[:, 30:], state)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected[:, 30:]).square().mean() < 0.01 * expected.var()


@pytest.mark.parametrize("kind", ["favor", "exact"])
def test_a_masked_model_is_refused(kind):
    with pytest.raises(ValueError, match="bidirectional attention cannot be decoded"):
        build(causal=False, kind=kind).prefill(sample(5))


@attentions
def test_steps_in_place_are_those_that_leave_the_state_alone(attention):
    """What a GPU captures as a graph, launched operation by operation; the same numbers, to the last bit."""
    model, tokens = build(**attention), sample(90)
    _, state = model.prefill(tokens[:, :40])
    expected, _ = decoded(model, tokens[:, 40:], state)
    decoder = Decoder(model, state, in_place=True)
    for _ in range(2):  # twice from the same state, which stays as it was
        held = [x.data_ptr() for x in decoding._moving(decoder.state)]
        found = torch.stack([decoder.step(token).clone() for token in tokens[:, 40:].unbind(1)], dim=1)
        assert torch.equal(found, expected)
        if decoder.in_place:
            assert held == [x.data_ptr() for x in decoding._moving(decoder.state)]
        decoder.begin(state)


def test_only_exact_layers_keep_every_key():
    model, tokens = build(layers=PLAN), sample(60)
    _, state = model.prefill(tokens[:, :50])
    _, state = decoded(model, tokens[:, 50:], state)
    assert [layer.recent.k.shape[1] for layer in state.layers] == [7, 60, 5]


@pytest.mark.parametrize("options", [{"kind": "exact"}, {"layers": PLAN}], ids=["all", "one"])
def test_exact_attention_says_why_its_steps_are_no_graph(caplog, options):
    decoding._say_once.cache_clear()
    model = build(**options)
    _, state = model.prefill(sample(5))
    assert not Decoder(model, state, in_place=True).in_place
    assert caplog.messages == [
        "Decoding launches every operation of a token by itself, not a CUDA graph: exact attention's state grows with "
        "every token."
    ]
    Decoder(model, state, in_place=True)
    assert len(caplog.messages) == 1


def test_a_capture_that_fails_is_said_and_decoding_goes_on(monkeypatch, caplog):
    """Here it fails for want of CUDA."""
    decoding._say_once.cache_clear()
    model, tokens = build(window=7), sample(60)
    _, state = model.prefill(tokens[:, :10])
    expected, _ = decoded(model, tokens[:, 10:], state)
    decoder = Decoder(model, state, in_place=True)
    monkeypatch.setattr(decoder, "captures", True)
    found = torch.stack([decoder.step(token) for token in tokens[:, 10:].unbind(1)], dim=1)
    assert torch.equal(found, expected)
    assert decoder.graph is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Decoding launches every operation of a token by itself, not a CUDA graph: ")


def test_steps_in_place_end_with_the_positions_that_were_learned():
    model = build(position="learned", max_positions=12)
    _, state = model.prefill(sample(10))
    decoder = Decoder(model, state, in_place=True)
    token = sample(1)[:, 0]
    decoder.step(token)
    decoder.step(token)
    with pytest.raises(LongseqError, match="13 tokens or more, but the model has learned 12 positions"):
        decoder.step(token)


def test_buffers_made_in_inference_mode_are_written_to_outside_too():
    model, tokens = build(window=7), sample(60)
    _, state = model.prefill(tokens[:, :10])
    expected, _ = decoded(model, tokens[:, 10:], state)
    with torch.inference_mode():
        _, state = model.prefill(tokens[:, :10])
        decoder = Decoder(model, state, in_place=True)
        first = decoder.step(tokens[:, 10]).clone()
    rest = [decoder.step(token) for token in tokens[:, 11:].unbind(1)]
    assert torch.equal(torch.stack([first, *rest], dim=1), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_decoder_goes_on_with_as_many_sequences_as_it_began_with(in_place):
    model, tokens = build(heads=1), sample(10)
    _, state = model.prefill(tokens)
    decoder = Decoder(model, state, in_place=in_place)
    with pytest.raises(ValueError, match="the decoder has 2 sequences; got a state of 1"):
        decoder.begin(state.select(torch.tensor([0])))
