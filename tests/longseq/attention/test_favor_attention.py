"""favor_attention against the float64 quadratic reference, and the promises its docstring makes."""

from __future__ import annotations

import pytest
import torch
from tests.longseq.attention.cases import (
    BATCH,
    FEATURES,
    POSITIVE,
    SIGNED,
    assert_equals_reference,
    inputs,
    reference,
)

from longseq.attention import bidirectional, favor_attention, projection_matrix, scan
from longseq.attention.reference import quadratic_attention

kernels = pytest.mark.parametrize("kernel", ["softmax", "relu"])
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def padding(length: int) -> torch.Tensor:
    keep = torch.ones(BATCH, length, dtype=torch.bool)
    keep[1, length // 2 + 1 :] = False
    return keep


@kernels
@directions
@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 301])
def test_output_and_gradients_equal_the_float64_reference_to_1e_5(kernel, causal, std, length):
    assert_equals_reference(*inputs(length, std), kernel=kernel, causal=causal)


@kernels
@directions
def test_a_single_position_attends_to_itself(kernel, causal):
    q, k, v = inputs(1)
    out = favor_attention(q, k, v, kernel=kernel, causal=causal, features=FEATURES)
    torch.testing.assert_close(out, v, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert q.grad.abs().max() < 1e-5
    torch.testing.assert_close(v.grad, torch.ones_like(v))


@pytest.mark.parametrize("kernel", POSITIVE)
@directions
def test_every_positive_kernel_equals_the_reference(kernel, causal):
    assert_equals_reference(*inputs(131), kernel=kernel, causal=causal)


@pytest.mark.parametrize("kernel", SIGNED)
@directions
def test_every_signed_kernel_equals_the_reference(kernel, causal):
    # Where the terms of a denominator do not cancel: q and k near a common vector.
    assert_equals_reference(*inputs(131, 0.1, common=0.5), tolerance=1e-4, kernel=kernel, causal=causal)


@directions
def test_oprf_equals_the_reference_with_its_constant(causal):
    assert_equals_reference(*inputs(131), kernel="oprf", oprf_a=-0.07, causal=causal)


@directions
def test_the_documented_range_holds_at_head_dim_64(causal):
    """Standard deviation 4: a score of 16·√64 = 128, beyond which fp32 does not hold every product of features."""
    rng = torch.Generator().manual_seed(0)
    q, k = (4 * torch.randn(1, 2, 200, 64, generator=rng) for _ in range(2))
    v = torch.randn(1, 2, 200, 64, generator=rng)
    expected = quadratic_attention(q, k, v, projection_matrix(256, 64, dtype=torch.float64), causal=causal)
    assert (favor_attention(q, k, v, causal=causal).double() - expected).abs().max() < 1e-4
    # In float64 the range is that of the inputs.
    q, k, v = 3 * q.double(), 3 * k.double(), v.double()
    expected = quadratic_attention(q, k, v, projection_matrix(256, 64, dtype=torch.float64), causal=causal)
    torch.testing.assert_close(favor_attention(q, k, v, causal=causal), expected, rtol=1e-9, atol=1e-9)


@kernels
@directions
@pytest.mark.parametrize("length", [5, 131])
def test_padding_is_hidden_as_if_the_keys_were_not_there(kernel, causal, length):
    q, k, v = inputs(length)
    keep = padding(length)
    out = favor_attention(q, k, v, kernel=kernel, causal=causal, features=FEATURES, key_padding=keep)
    expected = reference(q, k, v, kernel=kernel, causal=causal, key_padding=keep)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    real = int(keep[1].sum())
    alone = favor_attention(*(t[1:, :, :real] for t in (q, k, v)), kernel=kernel, causal=causal, features=FEATURES)
    torch.testing.assert_close(out[1:, :, :real], alone, rtol=1e-5, atol=1e-6)

    out.sum().backward()
    assert torch.all(k.grad[1, :, real:] == 0)
    assert torch.all(v.grad[1, :, real:] == 0)


@kernels
@pytest.mark.parametrize("position", [1, 100, 128, 200, 256, 300])
@pytest.mark.parametrize("scale", [1e4, -3.0, 0.0])
def test_causal_output_ignores_later_keys_to_the_last_bit(kernel, position, scale):
    q, k, v = inputs(301)
    out = favor_attention(q, k, v, kernel=kernel, causal=True, features=FEATURES)
    later_k, later_v = k.detach().clone(), v.detach().clone()
    later_k[:, :, position:] *= scale
    later_v[:, :, position:] *= scale
    changed = favor_attention(q, later_k, later_v, kernel=kernel, causal=True, features=FEATURES)
    assert torch.equal(out[:, :, :position], changed[:, :, :position])
    assert not torch.equal(out[:, :, position:], changed[:, :, position:])


@kernels
def test_causal_gradients_ignore_earlier_outputs(kernel):
    q, k, v = inputs(200)
    favor_attention(q, k, v, kernel=kernel, causal=True, features=FEATURES)[:, :, :150].sum().backward()
    assert all(torch.all(t.grad[:, :, 150:] == 0) for t in (q, k, v))


@pytest.mark.parametrize("kernel", POSITIVE)
@directions
@pytest.mark.parametrize("magnitude", [1e-4, 10.0, 100.0, 1e4])
def test_inputs_of_any_magnitude_give_finite_outputs_and_gradients(kernel, causal, magnitude):
    q, k, v = inputs(150, magnitude)
    out = favor_attention(q, k, v, kernel=kernel, causal=causal, features=FEATURES)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    # A weighted mean stays within its values.
    assert out.abs().max() <= v.abs().max() * 1.001


@pytest.mark.parametrize("kernel", SIGNED)
@directions
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_signed_kernels_stay_finite_at_any_magnitude(kernel, causal, magnitude):
    q, k, v = inputs(150, magnitude)
    out = favor_attention(q, k, v, kernel=kernel, causal=causal, features=FEATURES)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("kernel", ["softmax", "exp", "relu", "trigonometric", "gelu"])  # one of each vjp
@directions
def test_gradients_pass_gradcheck_in_float64(kernel, causal, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 2)
    monkeypatch.setattr(scan, "GROUP", 2)
    monkeypatch.setattr(bidirectional, "CHUNK", 2)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (1 + 0.3 * torch.randn(1, 1, 5, 3, dtype=torch.float64, generator=rng) for _ in range(3))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    keep = torch.tensor([[True] * 4 + [False]])

    def attention(*qkv):
        return favor_attention(*qkv, kernel=kernel, causal=causal, features=4, key_padding=keep)

    assert torch.autograd.gradcheck(attention, (q, k, v))


@kernels
@directions
def test_the_chunk_size_changes_nothing_but_rounding(kernel, causal, monkeypatch):
    q, k, v = inputs(130)
    whole = favor_attention(q, k, v, kernel=kernel, causal=causal, features=FEATURES)
    for module in (scan, bidirectional):
        monkeypatch.setattr(module, "CHUNK", 17)
    torch.testing.assert_close(
        favor_attention(q, k, v, kernel=kernel, causal=causal, features=FEATURES), whole, rtol=1e-5, atol=1e-5
    )


@directions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_in_its_dtype_and_is_the_same_under_autocast(causal, dtype):
    q, k, v = (t.detach().to(dtype) for t in inputs(333))
    out = favor_attention(q, k, v, causal=causal, features=FEATURES)
    assert out.dtype == dtype
    expected = reference(q, k, v, causal=causal, operands=dtype)
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(favor_attention(q, k, v, causal=causal, features=FEATURES), out)


@directions
def test_a_query_that_sees_no_key_gets_zeros(causal):
    q, k, v = inputs(6)
    keep = torch.zeros(BATCH, 6, dtype=torch.bool)
    keep[0, 3:] = True  # left padding
    out = favor_attention(q, k, v, causal=causal, features=FEATURES, key_padding=keep)
    out.sum().backward()
    assert torch.all(out[1] == 0)
    assert torch.all(out[0, :, :3] == 0) == causal
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_more_features_come_closer_to_softmax_attention():
    q, k, v = (t.detach() for t in inputs(64, 0.5))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = [
        sum((favor_attention(q, k, v, features=m, seed=s) - exact).square().mean().item() for s in range(5))
        for m in (16, 128, 1024)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_memory_of_the_sums_does_not_lose_small_terms():
    """Σφ(k) kept in bf16 stalls at 256 equal keys; ours must still average 4,000 of them."""
    length = 4000
    q = k = torch.zeros(1, 1, length, 8, dtype=torch.bfloat16)
    v = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1) / length
    out = favor_attention(q, k, v, causal=True, features=16)
    running_mean = v.double().cumsum(2) / torch.arange(1, length + 1).view(1, 1, -1, 1)
    torch.testing.assert_close(out.double(), running_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernel": "sotfmax"}, "unknown kernel 'sotfmax'"),
        ({"key_padding": torch.ones(BATCH, 5)}, "key_padding must be bool"),
        ({"key_padding": torch.ones(BATCH, 4, dtype=torch.bool)}, r"of shape \(2, 5\)"),
        ({"features": 0}, "features must be an integer from 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        favor_attention(*inputs(5), **change)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(5)
    with pytest.raises(ValueError, match="as many queries as keys"):
        favor_attention(q[:, :, :3], k, v, causal=True)
    with pytest.raises(ValueError, match="differ"):
        favor_attention(q[..., :8], k, v)
    with pytest.raises(ValueError, match="must be"):
        favor_attention(q[0], k[0], v[0])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 9}, {"kernel": "relu"}])
def test_a_backward_pass_inside_autocast_is_in_fp32_too(options):
    gradients = []
    for enabled in (False, True):
        q, k, v = inputs(70)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            favor_attention(q, k, v, features=FEATURES, **options).square().sum().backward()
        gradients.append([t.grad for t in (q, k, v)])
    assert all(torch.equal(plain, cast) for plain, cast in zip(*gradients, strict=True))


@directions
def test_no_keys_or_no_queries_give_zeros(causal):
    q, k, v = inputs(6)
    assert favor_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], causal=causal).shape == (*v.shape[:2], 0, v.shape[-1])
    if not causal:
        assert torch.all(favor_attention(q, k[:, :, :0], v[:, :, :0], features=FEATURES) == 0)
