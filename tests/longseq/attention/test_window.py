"""Exact attention near, features far: one denominator over both; decay and share of the far part."""

from __future__ import annotations

import pytest
import torch
from tests.longseq.attention.cases import BATCH, FEATURES, HEADS, SIGNED, assert_equals_reference, inputs

from longseq.attention import exact_attention, favor_attention, scan, window

directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
learned = pytest.mark.parametrize("with_learned", [False, True], ids=["plain", "share-decay"])


def share_and_decay(with_learned: bool) -> dict[str, torch.Tensor]:
    if not with_learned:
        return {}
    return {"far_share": torch.tensor([-1.5, 0.0, 0.7]), "decay": torch.tensor([0.2, 0.01, 0.0])}


def keep_some(length: int) -> torch.Tensor:
    keep = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[1, : length // 2] = False  # a query may see no key at all
    return keep


@directions
@learned
@pytest.mark.parametrize("kernel", ["softmax", "hyperbolic", "relu"])
@pytest.mark.parametrize("reach", [1, 7, 64, 100, 130])
def test_near_and_far_share_one_denominator_as_in_the_reference(kernel, causal, reach, with_learned):
    assert_equals_reference(*inputs(201), kernel=kernel, causal=causal, window=reach, **share_and_decay(with_learned))


@directions
@learned
@pytest.mark.parametrize("reach", [0, 3, 70])
def test_padding_is_hidden_near_and_far(causal, reach, with_learned):
    options = share_and_decay(with_learned)
    if not reach:
        options.pop("far_share", None)  # there is nothing near to share with
    assert_equals_reference(*inputs(150), causal=causal, window=reach, key_padding=keep_some(150), **options)


@directions
@pytest.mark.parametrize("length", [1, 2, 129, 200])
@pytest.mark.parametrize("more", [0, 1, 1000])
def test_a_window_of_the_length_or_more_is_exact_attention(causal, length, more):
    q, k, v = inputs(length, std=2.0)
    out = favor_attention(q, k, v, causal=causal, window=length + more, features=FEATURES)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(exact.sum(), (q, k, v)), strict=False
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@directions
def test_window_0_is_plain_favor(causal):
    q, k, v = inputs(140)
    plain = favor_attention(q, k, v, causal=causal, features=FEATURES)
    assert torch.equal(favor_attention(q, k, v, causal=causal, features=FEATURES, window=0), plain)


def test_a_window_comes_closer_to_exact_attention_than_features_alone():
    q, k, v = (t.detach() for t in inputs(300))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = [
        (favor_attention(q, k, v, causal=True, features=FEATURES, window=w) - exact).square().mean().item()
        for w in (0, 32, 128, 300)
    ]
    assert errors[0] > errors[1] > errors[2] > 100 * errors[3]


@directions
def test_without_features_only_the_window_is_seen(causal):
    q, k, v = (t.detach() for t in inputs(150))
    out = favor_attention(q, k, v, causal=causal, features=0, window=9)
    distance = torch.arange(150)[:, None] - torch.arange(150)
    near = (distance.abs() < 9) & ((distance >= 0) | (not causal))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", [5, 64, 150])
@pytest.mark.parametrize("position", [1, 63, 64, 128, 200, 300])
@pytest.mark.parametrize("scale", [1e4, -3.0, 0.0])
def test_causal_output_ignores_later_keys_to_the_last_bit(reach, position, scale):
    q, k, v = inputs(301)
    options = {"causal": True, "features": FEATURES, "window": reach, "decay": torch.tensor([0.1, 0.0, 0.01])}
    out = favor_attention(q, k, v, **options)
    later_k, later_v = k.detach().clone(), v.detach().clone()
    later_k[:, :, position:] *= scale
    later_v[:, :, position:] *= scale
    assert torch.equal(out[:, :, :position], favor_attention(q, later_k, later_v, **options)[:, :, :position])


@directions
@pytest.mark.parametrize("magnitude", [1e-4, 100.0, 1e4])
def test_inputs_of_any_magnitude_give_finite_outputs_and_gradients(causal, magnitude):
    q, k, v = inputs(150, magnitude)
    options = {name: value.requires_grad_() for name, value in share_and_decay(True).items()}
    out = favor_attention(q, k, v, causal=causal, window=40, features=FEATURES, **options)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v, *options.values()))
    assert out.abs().max() <= v.abs().max() * 1.001


@directions
@pytest.mark.parametrize("reach", [0, 1, 3, 20])
def test_gradients_pass_gradcheck_in_float64(causal, reach, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 2)
    monkeypatch.setattr(scan, "GROUP", 2)
    monkeypatch.setattr(window, "BLOCK", 3)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 2, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(3))
    share, decay = (torch.rand(2, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(2))
    keep = torch.tensor([[True] * 2 + [False] + [True] * 4])
    documents = torch.tensor([[0] * 5 + [1] * 2])

    def attention(q, k, v, share, decay):
        return favor_attention(
            q,
            k,
            v,
            causal=causal,
            features=4,
            window=reach,
            key_padding=keep,
            segments=documents,
            far_share=share if reach else None,
            decay=decay,
        )

    assert torch.autograd.gradcheck(attention, (q, k, v, share, decay))


def test_the_gradient_of_a_decay_survives_a_long_sequence():
    """Positions enter it as large numbers that nearly cancel."""
    length = 3000
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 8, generator=rng) for _ in range(3))
    decay = torch.tensor([0.05])
    gradients = []
    for dtype in (torch.float32, torch.float64):
        rate = decay.to(dtype).requires_grad_()
        out = favor_attention(*(t.to(dtype) for t in (q, k, v)), causal=True, features=32, decay=rate)
        gradients += torch.autograd.grad((out * v.to(dtype)).sum(), rate)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-3)


@directions
def test_exact_attention_decays_as_favor_attention_does(causal):
    q, k, v = (t.detach() for t in inputs(90))
    decay = torch.tensor([0.3, 0.02, 0.0])
    exact = exact_attention(q, k, v, causal=causal, decay=decay, key_padding=keep_some(90))
    near = favor_attention(q, k, v, causal=causal, decay=decay, key_padding=keep_some(90), window=90, features=FEATURES)
    torch.testing.assert_close(exact, near, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", SIGNED)
def test_signed_kernels_refuse_a_window(kernel):
    with pytest.raises(ValueError, match="both signs"):
        favor_attention(*inputs(5), kernel=kernel, window=2, features=FEATURES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": -1}, "window must be an integer from 0"),
        ({"far_share": torch.zeros(HEADS)}, "far_share weighs the keys beyond a window"),
        ({"far_share": torch.zeros(HEADS + 1), "window": 3}, "far_share must have one number a head"),
        ({"decay": torch.zeros(1)}, "decay must have one number a head"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        favor_attention(*inputs(5), **change)
