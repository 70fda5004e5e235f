"""The oracle itself: against explicit loops, and against what its options must come to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import KERNELS
from longseq.attention.feature_maps import feature_map
from longseq.attention.projections import projection_matrix
from longseq.attention.reference import quadratic_attention

BATCH, HEADS, LENGTH, HEAD_DIM, VALUE_DIM, FEATURES = 2, 3, 9, 4, 5, 6

kernels = pytest.mark.parametrize("kernel", KERNELS)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@pytest.fixture
def qkv() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, LENGTH)
    return [torch.randn(*shape, dim, generator=rng, dtype=torch.float64) for dim in (HEAD_DIM, HEAD_DIM, VALUE_DIM)]


def omega_of(kernel: str) -> Tensor | None:
    if kernel == "relu_direct":
        return None
    rows = FEATURES // 2 if kernel in ("hyperbolic", "trigonometric") else FEATURES
    lengths = "sqrt_d" if kernel == "smreg" else "chi"
    return projection_matrix(rows, HEAD_DIM, rows=lengths, dtype=torch.float64)


def runs(ids: list[int]) -> list[slice]:
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1]]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


@kernels
@directions
def test_every_option_at_once_equals_explicit_loops_over_the_feature_map(kernel, causal, qkv):
    q, k, v = qkv
    oprf_a = {"oprf": -0.1, "aderf": tuple(-0.03 * place for place in range(HEAD_DIM))}.get(kernel, 0.0)
    window, segments = 3, torch.tensor([[4] * 5 + [1] * 4, [0] * 2 + [7] * 4 + [0] * 3])
    keep = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    keep[0, 2], keep[1, :2] = False, False
    far_share, decay = torch.tensor([[0.0, -0.7, 0.4], [0.0, 0.2, 1.0]], dtype=torch.float64)
    chosen = feature_map(kernel, FEATURES, HEAD_DIM, oprf_a=oprf_a, dtype=torch.float64)
    phi_q, phi_k = (features * scale.exp() for features, scale in (chosen.queries(q), chosen.keys(k)))

    expected = torch.zeros_like(v)
    for b in range(BATCH):
        for document in runs(segments[b].tolist()):
            positions = range(LENGTH)[document]
            for h, i in ((h, i) for h in range(HEADS) for i in positions):
                num, den = torch.zeros(VALUE_DIM, dtype=torch.float64), 0.0
                for j in positions:
                    if not keep[b, j] or (causal and j > i):
                        continue
                    if abs(i - j) < window:
                        weight = math.exp(q[b, h, i] @ k[b, h, j] / math.sqrt(HEAD_DIM))
                    else:
                        weight = (phi_q[b, h, i] @ phi_k[b, h, j]).item() * math.exp(far_share[h])
                    weight *= math.exp(-decay[h] * abs(i - j))
                    num, den = num + weight * v[b, h, j], den + weight
                if den:
                    expected[b, h, i] = num / den

    found = quadratic_attention(
        *qkv, omega_of(kernel), kernel=kernel, causal=causal, window=window, key_padding=keep, segments=segments,
        oprf_a=oprf_a, far_share=far_share, decay=decay,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.all(found[1, :, :2] == 0), "a document of padding alone sees nothing"


@kernels
@directions
def test_without_options_it_is_the_quotient_of_the_features(kernel, causal, qkv):
    q, k, v = qkv
    chosen = feature_map(kernel, FEATURES, HEAD_DIM, dtype=torch.float64)
    phi_q, phi_k = (features * scale.exp() for features, scale in (chosen.queries(q), chosen.keys(k)))
    weights = phi_q @ phi_k.mT
    weights = weights.tril() if causal else weights
    expected = weights @ v / weights.sum(-1, keepdim=True)
    found = quadratic_attention(q, k, v, omega_of(kernel), kernel=kernel, causal=causal)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@directions
@pytest.mark.parametrize("window", [LENGTH, 10 * LENGTH])
def test_a_window_over_everything_is_softmax_attention(causal, window, qkv):
    expected = F.scaled_dot_product_attention(*qkv, is_causal=causal)
    found = quadratic_attention(*qkv, omega_of("softmax"), causal=causal, window=window, far_share=torch.ones(HEADS))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@directions
def test_each_document_is_as_if_alone(causal, qkv):
    segments = torch.tensor([[1, 1, 2, 2, 2, 2, 1, 1, 1]] * BATCH)  # the same id again is another document
    omega, options = omega_of("relu"), {"kernel": "relu", "causal": causal, "window": 2}
    packed = quadratic_attention(*qkv, omega, segments=segments, **options)
    for document in runs(segments[0].tolist()):
        alone = quadratic_attention(*(t[:, :, document] for t in qkv), omega, **options)
        torch.testing.assert_close(packed[:, :, document], alone, rtol=1e-12, atol=1e-12)


def test_scores_beyond_the_range_of_float64_stay_finite_with_their_gradients(qkv):
    q, k, v = ((100 * t).requires_grad_() for t in qkv)
    out = quadratic_attention(q, k, v, omega_of("softmax"), causal=True, window=2)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_a_kernel_without_a_reference_is_refused(qkv):
    with pytest.raises(ValueError, match="no reference for kernel 'sotfmax'"):
        quadratic_attention(*qkv, omega_of("softmax"), kernel="sotfmax")
    with pytest.raises(ValueError, match="kernel 'softmax' needs a projection"):
        quadratic_attention(*qkv, None)
