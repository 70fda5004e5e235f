"""Decoding one token at a time gives what attention over the whole sequence gives, from a state of fixed size."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from longseq.attention import KERNELS, RecurrentState, decode, exact_attention, favor_attention, prefill, prefill_exact
from longseq.attention.feature_maps import feature_map
from longseq.attention.state import AttentionState

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, HEADS, HEAD_DIM, VALUE_DIM, FEATURES = 2, 3, 8, 5, 16
SIGNED = [kernel for kernel in KERNELS if not feature_map(kernel, FEATURES, HEAD_DIM).positive]
POSITIVE = [kernel for kernel in KERNELS if kernel not in SIGNED]
DECAY, SHARE = torch.tensor([0.0, 0.02, 1.5]), torch.tensor([-3.0, 0.0, 2.0])

windows = pytest.mark.parametrize("window", [0, 1, 7, 64])


def inputs(length: int, std: float = 1.0, dtype: torch.dtype = torch.float32, batch: int = BATCH) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)
    q, k = (std * torch.randn(batch, HEADS, length, HEAD_DIM, generator=rng) for _ in range(2))
    return [t.to(dtype) for t in (q, k, torch.randn(batch, HEADS, length, VALUE_DIM, generator=rng))]


def positions(qkv: list[Tensor], start: int, stop: int | None = None) -> list[Tensor]:
    return [t[:, :, start:stop] for t in qkv]


def decoded(qkv: list[Tensor], state: RecurrentState) -> tuple[Tensor, RecurrentState]:
    """One call a token."""
    outs = []
    for at in range(qkv[0].shape[2]):
        out, state = decode(*positions(qkv, at, at + 1), state)
        outs.append(out)
    return torch.cat(outs, dim=2), state


def in_two_parts(qkv: list[Tensor], prompt: int, key_padding: Tensor | None = None, **options) -> Tensor:
    first, state = prefill(*positions(qkv, 0, prompt), key_padding=key_padding, **options)
    return torch.cat((first, decoded(positions(qkv, prompt), state)[0]), dim=2)


def tensors(state: object) -> list[Tensor]:
    """Every tensor that grows out of the keys; the feature map is shared by all states."""
    if isinstance(state, Tensor):
        return [state]
    if dataclasses.is_dataclass(state):
        fields = (getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "feature_map")
        return [tensor for field in fields for tensor in tensors(field)]
    return []


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_state_can_be_pickled_and_goes_on_where_it_was(kernel):
    qkv = inputs(20)
    _, state = prefill(*positions(qkv, 0, 12), kernel=kernel, features=FEATURES, window=3 if kernel in POSITIVE else 0)
    restored = pickle.loads(pickle.dumps(state))
    expected, _ = decoded(positions(qkv, 12), state)
    found, _ = decoded(positions(qkv, 12), restored)
    assert torch.equal(found, expected)


# the same as attention over the whole sequence


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("prompt", [0, 1003])
def test_4096_tokens_are_decoded_to_1e_5(window, prompt):
    qkv = inputs(4096, batch=1)
    out = in_two_parts(qkv, prompt, window=window, features=FEATURES)
    expected = favor_attention(*qkv, causal=True, window=window, features=FEATURES)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", POSITIVE)
@windows
def test_every_positive_kernel_decodes_with_and_without_a_window(kernel, window):
    qkv, options = inputs(200), {"kernel": kernel, "window": window, "features": FEATURES}
    out = in_two_parts(qkv, 61, **options)
    torch.testing.assert_close(out, favor_attention(*qkv, causal=True, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", SIGNED)
def test_every_signed_kernel_decodes(kernel):
    """In float64: their denominators cancel, and outputs of 1e3 in fp32 are mostly rounding."""
    qkv = inputs(200, dtype=torch.float64)
    out = in_two_parts(qkv, 61, kernel=kernel, features=FEATURES)
    expected = favor_attention(*qkv, causal=True, kernel=kernel, features=FEATURES)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)


@windows
@pytest.mark.parametrize("prompt", [0, 1, 6, 7, 8, 63, 64, 65, 130])
def test_the_prompt_may_end_anywhere(window, prompt):
    """Before the window is full, when it just is, after; and not at a chunk's end."""
    qkv, options = (
        inputs(150),
        {"window": window, "features": FEATURES, "decay": DECAY, "far_share": SHARE if window else None},
    )
    out = in_two_parts(qkv, prompt, **options)
    torch.testing.assert_close(out, favor_attention(*qkv, causal=True, **options), rtol=1e-5, atol=1e-5)


@windows
@pytest.mark.parametrize("options", [{"decay": DECAY}, {"far_share": SHARE}, {"oprf_a": -0.1, "kernel": "oprf"}])
def test_options_are_those_of_the_batch(window, options):
    qkv, options = inputs(200, std=1.5), {"window": window, "features": FEATURES, "seed": 5, "draw": 3, **options}
    if not window:
        options.pop("far_share", None)
    out = in_two_parts(qkv, 61, **options)
    torch.testing.assert_close(out, favor_attention(*qkv, causal=True, **options), rtol=1e-5, atol=1e-5)


@windows
def test_in_float64_the_two_agree_to_rounding(window):
    """So what fp32 shows above is rounding and nothing else."""
    qkv = inputs(600, std=2, dtype=torch.float64)
    options = {"window": window, "features": FEATURES, "decay": DECAY, "far_share": SHARE if window else None}
    out = in_two_parts(qkv, 333, **options)
    torch.testing.assert_close(out, favor_attention(*qkv, causal=True, **options), rtol=1e-11, atol=1e-12)


def test_a_window_longer_than_the_sequence_is_exact_attention():
    qkv = inputs(90)
    for prompt in (0, 40):
        out = in_two_parts(qkv, prompt, window=100, features=FEATURES, decay=DECAY)
        torch.testing.assert_close(out, exact_attention(*qkv, causal=True, decay=DECAY), rtol=1e-5, atol=1e-6)


def test_without_features_nothing_beyond_the_window_is_seen():
    qkv = inputs(90)
    out = in_two_parts(qkv, 40, window=7, features=0, decay=DECAY)
    expected = favor_attention(*qkv, causal=True, window=7, features=0, decay=DECAY)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    qkv[1][:, :, :80], qkv[2][:, :, :80] = 7.0, 100.0
    torch.testing.assert_close(in_two_parts(qkv, 40, window=7, features=0, decay=DECAY)[:, :, 86:], out[:, :, 86:])


@pytest.mark.parametrize("decay", [None, DECAY])
@pytest.mark.parametrize("prompt", [1, 61])
def test_exact_attention_decodes_from_a_cache(decay, prompt):
    qkv, keep = inputs(120), torch.ones(BATCH, 120, dtype=torch.bool)
    keep[1, : prompt // 2] = False
    first, state = prefill_exact(*positions(qkv, 0, prompt), decay=decay, key_padding=keep[:, :prompt])
    out = torch.cat((first, decoded(positions(qkv, prompt), state)[0]), dim=2)
    expected = exact_attention(*qkv, causal=True, decay=decay, key_padding=keep)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@windows
@pytest.mark.parametrize("decay", [None, DECAY])
def test_hidden_keys_of_the_prompt_stay_hidden(window, decay):
    qkv, prompt = inputs(150), 70
    keep = torch.ones(BATCH, 150, dtype=torch.bool)
    keep[0, :31], keep[1, 40:prompt] = False, False  # one padded in front, one behind
    for x in qkv[1:]:
        x.masked_fill_(~keep[:, None, :, None], torch.nan)
    options = {"window": window, "features": FEATURES, "decay": decay}
    out = in_two_parts(qkv, prompt, keep[:, :prompt], **options)
    expected = favor_attention(*qkv, causal=True, key_padding=keep, **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    # Padding in front is as if it were not there.
    alone = in_two_parts([t[:1, :, 31:] for t in qkv], prompt - 31, **options)
    torch.testing.assert_close(out[:1, :, 31:], alone, rtol=1e-5, atol=1e-5)


@windows
def test_a_prompt_that_is_all_padding_is_an_empty_one(window):
    qkv = inputs(90)
    keep = torch.zeros(BATCH, 40, dtype=torch.bool)
    out = in_two_parts(qkv, 40, keep, window=window, features=FEATURES)
    expected = in_two_parts(positions(qkv, 40), 0, window=window, features=FEATURES)
    assert torch.all(out[:, :, :40] == 0)
    torch.testing.assert_close(out[:, :, 40:], expected, rtol=1e-5, atol=1e-6)


@windows
def test_several_tokens_in_a_call_are_the_same_as_one_by_one(window):
    qkv = inputs(100)
    _, state = prefill(*positions(qkv, 0, 61), window=window, features=FEATURES)
    single, after = decoded(positions(qkv, 61), state)
    several, also_after = decode(*positions(qkv, 61), state)
    assert torch.equal(single, several)
    for one, other in zip(tensors(after), tensors(also_after), strict=True):
        assert torch.equal(one, other)


@windows
def test_bf16_inputs_are_decoded_in_fp32(window):
    qkv = inputs(150, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = in_two_parts(qkv, 61, window=window, features=FEATURES, decay=DECAY)
        _, state = prefill(*qkv, window=window, features=FEATURES, decay=DECAY)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, in_two_parts(qkv, 61, window=window, features=FEATURES, decay=DECAY))
    whole = favor_attention(*qkv, causal=True, window=window, features=FEATURES, decay=DECAY)
    torch.testing.assert_close(out, whole, rtol=2**-7, atol=1e-5)  # a unit in the last place of bf16
    assert all(tensor.dtype == torch.float32 for tensor in tensors(state))


@windows
@pytest.mark.parametrize("magnitude", [1e-4, 10.0, 100.0, 1e4])
def test_inputs_of_any_magnitude_give_a_weighted_mean(window, magnitude):
    qkv = inputs(150, std=magnitude)
    out = in_two_parts(qkv, 61, window=window, features=FEATURES, far_share=SHARE if window else None)
    assert out.isfinite().all()
    assert out.abs().max() <= qkv[2].abs().max() * 1.001


def test_keys_that_all_fit_badly_are_not_lost_beside_an_empty_place():
    """Scores of −300 in a window that is not full: relative to a score of 0 they would all be 0."""
    q, k, v = inputs(20)
    q, k = q.abs() * 10, -k.abs() * 10
    out = in_two_parts([q, k, v], 3, window=50, features=FEATURES)
    torch.testing.assert_close(out, exact_attention(q, k, v, causal=True), rtol=1e-4, atol=1e-4)


# the state


@windows
def test_the_state_has_the_same_size_after_any_number_of_tokens(window):
    def size(state: RecurrentState) -> int:
        return sum(tensor.numel() for tensor in tensors(state))

    qkv = inputs(1000)
    sizes = [size(prefill(*positions(qkv, 0, prompt), window=window, features=FEATURES)[1]) for prompt in (0, 10, 1000)]
    state = prefill(*positions(qkv, 0, 0), window=window, features=FEATURES)[1]
    for tokens in (10, 190):
        _, state = decode(*positions(qkv, 0, tokens), state)
        sizes.append(size(state))
    sums = FEATURES * (VALUE_DIM + 1) + 1
    assert sizes == [BATCH * HEADS * (sums + window * (HEAD_DIM + VALUE_DIM + 2))] * 5


@windows
def test_one_state_gives_each_continuation_its_own_result(window):
    prompt, one, other = inputs(61), inputs(30), inputs(31)
    options = {"window": window, "features": FEATURES, "decay": DECAY}
    _, state = prefill(*prompt, **options)
    before = [tensor.clone() for tensor in tensors(state)]
    outs = [decoded(branch, state)[0] for branch in (one, other, one)]
    for was, tensor in zip(before, tensors(state), strict=True):
        assert torch.equal(was, tensor)
    assert torch.equal(outs[0], outs[2])
    for branch, out in zip((one, other), outs, strict=False):
        whole = [torch.cat(parts, dim=2) for parts in zip(prompt, branch, strict=True)]
        expected = favor_attention(*whole, causal=True, **options)[:, :, 61:]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 7, None])
def test_sequences_are_selected_reordered_and_repeated(window):
    qkv, order = inputs(100), torch.tensor([1, 0, 1])
    if window is None:
        _, state = prefill_exact(*positions(qkv, 0, 61), decay=DECAY)
    else:
        share = SHARE if window else None
        _, state = prefill(*positions(qkv, 0, 61), window=window, features=FEATURES, decay=DECAY, far_share=share)
    expected, _ = decode(*positions(qkv, 61), state)
    out, _ = decode(*(t[order] for t in positions(qkv, 61)), state.select(order))
    torch.testing.assert_close(out, expected[order], rtol=1e-6, atol=1e-6)


def test_the_state_is_the_sums_over_the_keys_beyond_the_window():
    _, k, v = inputs(530, dtype=torch.float64)
    _, state = prefill(k, k, v, window=7, features=FEATURES, decay=DECAY)
    features, scale = feature_map("softmax", FEATURES, HEAD_DIM, dtype=torch.float64).keys(k[:, :, :523])
    scale = scale - DECAY.double()[:, None, None] * torch.arange(529, 6, -1)[:, None]
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)[:, :, :523]
    expected = (features * scale.exp()).mT @ values
    far: AttentionState = state.far.state
    torch.testing.assert_close((far.sums * far.log_scale.exp()).unflatten(0, (BATCH, HEADS)), expected)


def test_decoding_leaves_no_graph_behind():
    q, k, v = (t.requires_grad_() for t in inputs(9))
    out, state = prefill(q, k, v, window=3, features=FEATURES, decay=DECAY.clone().requires_grad_())
    next_out, state = decode(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)
    assert not any(tensor.requires_grad for tensor in (out, next_out, *tensors(state)))


# errors


def test_bidirectional_attention_is_refused():
    for begin in (prefill, prefill_exact):
        with pytest.raises(ValueError, match="bidirectional attention cannot be decoded"):
            begin(*inputs(9), causal=False)


@pytest.mark.parametrize("length", [0, 9])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": -1}, "window must be"),
        ({"kernel": "tanh", "window": 3}, "both signs"),
        ({"kernel": "sotfmax"}, "unknown kernel"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"decay": torch.zeros(2)}, "decay must have one number a head"),
        ({"key_padding": torch.ones(BATCH, 4, dtype=torch.bool)}, "key_padding must be"),
    ],
)
def test_prompts_are_refused_as_attention_refuses_them(length, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        prefill(*inputs(length), **options)


def test_positions_that_do_not_continue_the_prompt_are_refused():
    qkv = inputs(9)
    _, state = prefill(*qkv, window=3, features=FEATURES)
    now = positions(qkv, 8)
    for wrong in (
        [t[:1] for t in now],  # another batch
        [t[:, :2] for t in now],  # other heads
        [*now[:2], now[2][..., :-1]],  # another value_dim
        [now[0], now[1][..., :-1], now[2]],
        [t[..., :-1] for t in now[:2]] + now[2:],  # another head_dim
        [t[:, :, None] for t in now],
    ):
        with pytest.raises(ValueError, match="the state continues with"):
            decode(*wrong, state)
