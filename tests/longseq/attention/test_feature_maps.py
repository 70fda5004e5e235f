"""Every kernel against its formula in float64: values, gradients, range, and the statistics that the papers promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import KERNELS
from longseq.attention.feature_maps import (
    feature_map,
)
from longseq.attention.oprf import oprf_a_from_moments, oprf_moments, oprf_parameter
from longseq.attention.options import FRAMED_KERNELS
from longseq.attention.projections import projection_matrix

HEAD_DIM, FEATURES = 6, 10
OPRF_A = -0.07

kernels = pytest.mark.parametrize("kernel", KERNELS)
SOFTMAX_KERNELS = {"softmax": 0.0, "hyperbolic": 0.0, "oprf": OPRF_A, "trigonometric": 0.0}  # unbiased; with their A
ACTIVATIONS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "abs": torch.abs,
    "gelu": F.gelu,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "identity": lambda u: u,
    "elu": lambda u: torch.where(u > 0, u + 1, torch.exp(u.clamp(max=0))),
}


def a_of(kernel: str, d: int = HEAD_DIM) -> float | tuple[float, ...]:
    if kernel in FRAMED_KERNELS:  # a number a coordinate
        return tuple(OPRF_A * place / d for place in range(d))
    return OPRF_A if kernel == "oprf" else 0.0


def phi(kernel: str, q: Tensor, projection: str = "orthogonal") -> Tensor:
    """The formula in float64, log-scale and all."""
    x = q.double() * HEAD_DIM**-0.25
    if kernel == "relu_direct":
        return torch.relu(x) + 1e-3
    rows = FEATURES // 2 if kernel in ("hyperbolic", "trigonometric") else FEATURES
    lengths = "sqrt_d" if kernel == "smreg" else "chi"
    omega = projection_matrix(
        rows, HEAD_DIM, seed=3, orthogonal=projection == "orthogonal", rows=lengths, dtype=torch.float64
    )
    u, norm = x @ omega.T, x.square().sum(-1, keepdim=True)
    if kernel == "oprf":
        exponent = OPRF_A * omega.square().sum(1) + math.sqrt(1 - 4 * OPRF_A) * u - norm / 2
        return (1 - 4 * OPRF_A) ** (HEAD_DIM / 4) * torch.exp(exponent) / math.sqrt(rows)
    if kernel in FRAMED_KERNELS:
        a = torch.diag(torch.tensor(a_of(kernel), dtype=torch.float64))
        stretch = torch.eye(HEAD_DIM) - 4 * a
        exponent = ((omega @ a) * omega).sum(1) + x @ (omega @ stretch.sqrt()).T - norm / 2
        return torch.det(stretch) ** 0.25 * torch.exp(exponent) / math.sqrt(rows)
    if kernel == "hyperbolic":
        return torch.exp(-norm / 2) * torch.cat((u.exp(), (-u).exp()), -1) / math.sqrt(2 * rows)
    if kernel == "trigonometric":
        return torch.exp(norm / 2) * torch.cat((u.cos(), u.sin()), -1) / math.sqrt(rows)
    if kernel in ("softmax", "smreg"):
        return torch.exp(u - norm / 2) / math.sqrt(rows)
    return (ACTIVATIONS[kernel](u) + 1e-3) / math.sqrt(rows)


def make(kernel: str, dtype: torch.dtype = torch.float64, **options):
    return feature_map(kernel, FEATURES, HEAD_DIM, seed=3, oprf_a=a_of(kernel), dtype=dtype, **options)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@kernels
@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_features_times_their_scale_are_the_formula(kernel, projection, side):
    q = normal(2, 3, 5, HEAD_DIM)
    chosen = make(kernel, projection=projection)
    features, log_scale = getattr(chosen, side)(q)
    assert features.shape == (2, 3, 5, chosen.features)
    assert log_scale.shape == (2, 3, 5, 1)
    torch.testing.assert_close(features * log_scale.exp(), phi(kernel, q, projection), rtol=1e-12, atol=1e-14)


@kernels
def test_fp32_features_are_those_of_float64_to_1e_5_of_their_row(kernel):
    q = normal(4, 7, HEAD_DIM, dtype=torch.float32)
    features, log_scale = make(kernel, torch.float32).queries(q)
    assert features.dtype == log_scale.dtype == torch.float32
    exact = phi(kernel, q)
    error = ((features * log_scale.exp()).double() - exact).abs() / exact.abs().amax(-1, keepdim=True)
    assert error.max() < 1e-5


@kernels
@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_vjp_is_the_gradient_of_the_formula(kernel, side, dtype, tolerance):
    chosen = make(kernel, dtype)
    q = normal(2, 3, 5, HEAD_DIM, dtype=dtype)
    d_phi = normal(2, 3, 5, chosen.features, seed=1, dtype=dtype)
    exact_q = q.double().requires_grad_()
    (wanted,) = torch.autograd.grad(phi(kernel, exact_q), exact_q, d_phi.double())
    features, log_scale = getattr(chosen, side)(q)
    before = features.clone()
    got = getattr(chosen, side + "_vjp")(q, features, d_phi * log_scale.exp())
    assert (got - wanted).abs().max() < tolerance * wanted.abs().max()
    assert torch.equal(features, before), "the features belong to the caller"


@kernels
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 100.0, 1e4])
def test_inputs_up_to_1e4_give_finite_features_scales_and_gradients_in_fp32(kernel, magnitude):
    head_dim = 32
    q = magnitude * normal(3, 9, head_dim, dtype=torch.float32)
    q[0, 0] = 0
    q[0, 1] = magnitude
    chosen = feature_map(kernel, 64, head_dim, oprf_a=a_of(kernel, head_dim))
    features, log_scale = chosen.queries(q)
    grad = chosen.queries_vjp(q, features, torch.ones_like(features))
    for tensor in (features, log_scale, grad):
        assert tensor.isfinite().all()
    if chosen.positive:
        product = features[0] @ features[0].T
        assert product.min() > torch.finfo(torch.float32).tiny


@kernels
def test_a_row_depends_on_that_row_alone_to_the_last_bit(kernel):
    chosen = make(kernel, torch.float32)
    q = normal(2, 9, HEAD_DIM, dtype=torch.float32)
    other = q.clone()
    other[:, 5:] *= 1e4
    for one, changed in zip(chosen.keys(q), chosen.keys(other), strict=True):
        assert torch.equal(one[:, :5], changed[:, :5])


@kernels
def test_the_returned_tensors_are_the_callers_to_modify(kernel):
    chosen, q = make(kernel), normal(5, HEAD_DIM)
    kept = q.clone()
    first = [t.clone() for t in chosen.queries(q)]
    for tensor in chosen.queries(q):
        tensor.zero_()
    assert torch.equal(q, kept)
    assert all(torch.equal(one, other) for one, other in zip(first, chosen.queries(q), strict=True))


def test_negative_features_belong_to_maps_that_say_so():
    x = normal(200, HEAD_DIM)
    for kernel in KERNELS:
        chosen = make(kernel)
        assert (chosen.queries(x)[0].min().item() > 0) == chosen.positive, kernel


def products(kernel: str, q: Tensor, k: Tensor, draws: int, oprf_a: float = 0.0, projection: str = "orthogonal"):
    """φ(q)ᵀφ(k) in true scale, (draws, Lq, Lk), with head_dim features a draw.

    Blocks of head_dim rows are drawn independently, so that one large map is many small ones.
    """
    d, paired = q.shape[-1], 2 if kernel in ("hyperbolic", "trigonometric") else 1
    many = feature_map(kernel, d * draws, d, oprf_a=oprf_a, projection=projection, dtype=torch.float64)
    (fq, q_scale), (fk, k_scale) = many.queries(q), many.keys(k)
    terms = (fq * q_scale.exp())[:, None] * (fk * k_scale.exp())  # (Lq, Lk, features)
    small = terms.view(len(q), len(k), paired, draws, d // paired).sum((2, 4)) * draws
    return small.permute(2, 0, 1)


@pytest.mark.parametrize("kernel", SOFTMAX_KERNELS)
@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_the_mean_over_draws_is_the_exact_softmax_weight(kernel, projection):
    q, k = 0.4 * normal(3, 4), 0.4 * normal(5, 4, seed=1)
    found = products(kernel, q, k, 20_000, SOFTMAX_KERNELS[kernel], projection)
    exact = torch.exp(q @ k.T / 4**0.5)
    standard_error = found.std(0) / len(found) ** 0.5
    assert (standard_error / exact).max() < 0.02, "too few draws to say"
    assert ((found.mean(0) - exact).abs() / standard_error).max() < 4


def test_hyperbolic_features_have_a_smaller_error_than_positive_ones():
    q, k = 0.4 * normal(3, 4), 0.4 * normal(5, 4, seed=1)
    exact = torch.exp(q @ k.T / 4**0.5)
    errors = {
        kernel: (products(kernel, q, k, 10_000, projection="iid") - exact).square().mean()
        for kernel in ("softmax", "hyperbolic")
    }
    assert errors["hyperbolic"] < 0.95 * errors["softmax"]  # of the same number of features, not of projections


def test_oprf_with_its_parameter_has_less_variance_than_softmax():
    """Unit-normal q and k at head_dim 4: ‖x + y‖² is 4 on average, and positive features are heavy-tailed."""
    q, k = normal(6, 4), normal(6, 4, seed=1)
    a = oprf_parameter(q[None, None], k[None, None])
    assert a < -0.05
    exact = torch.exp(q @ k.T / 4**0.5)
    plain = (products("softmax", q, k, 10_000) - exact).square().mean()
    assert (products("oprf", q, k, 10_000, a) - exact).square().mean() < 0.5 * plain


def test_oprf_with_a_of_0_is_softmax_bit_for_bit():
    q, grad = normal(5, HEAD_DIM), normal(5, FEATURES, seed=1)
    softmax, oprf = (feature_map(kernel, FEATURES, HEAD_DIM, dtype=torch.float64) for kernel in ("softmax", "oprf"))
    (features, scale), (other_features, other_scale) = softmax.queries(q), oprf.queries(q)
    assert torch.equal(features, other_features)
    assert torch.equal(scale, other_scale)
    assert torch.equal(softmax.queries_vjp(q, features, grad.clone()), oprf.queries_vjp(q, features, grad.clone()))


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_the_oprf_parameter_minimises_the_second_moment(std):
    """For one pair, E[(f(x) f(y))²] = C · (1−4A)^d (1−8A)^{−d/2} exp(2(1−4A)/(1−8A)·‖x+y‖²), C free of A."""
    d = 5
    q, k = std * normal(1, 1, 1, d), std * normal(1, 1, 1, d, seed=1)
    squared = ((q + k) * d**-0.25).square().sum().item()

    def log_moment(a: float) -> float:
        stretch = 1 - 4 * a
        return d * math.log(stretch) - d / 2 * math.log(1 - 8 * a) + 2 * stretch / (1 - 8 * a) * squared

    best = min((-i / 10_000 for i in range(20_000)), key=log_moment)
    assert oprf_parameter(q, k) == pytest.approx(best, abs=2e-4)


def test_oprf_moments_add_up_over_batches_and_shards():
    q, k = normal(4, 3, 7, HEAD_DIM), 2 + normal(4, 3, 11, HEAD_DIM, seed=1)
    batches = oprf_moments(q[:1], k[:1]) + oprf_moments(q[1:], k[1:])
    shards = oprf_moments(q[:, :, :2], k[:, :, :6]) + oprf_moments(q[:, :, 2:], k[:, :, 6:])
    whole = oprf_parameter(q, k)
    assert oprf_a_from_moments(batches) == pytest.approx(whole, rel=1e-12)
    assert oprf_a_from_moments(shards) == pytest.approx(whole, rel=1e-12)


def test_oprf_moments_hold_the_mean_over_all_pairs_of_a_head():
    """One head: the mean of ‖x + y‖² over pairs, put into the paper's formula."""
    q, k = normal(1, 1, 4, HEAD_DIM), 0.5 + normal(1, 1, 6, HEAD_DIM, seed=1)
    squared = ((q[0, 0, :, None] + k[0, 0]) * HEAD_DIM**-0.25).square().sum(-1).mean().item()
    ratio = squared / HEAD_DIM
    wanted = (1 - 2 * ratio - math.sqrt((2 * ratio + 1) ** 2 + 8 * ratio)) / 16
    assert oprf_parameter(q, k) == pytest.approx(wanted, rel=1e-12)


def test_the_oprf_parameter_of_zeros_is_0():
    zeros = torch.zeros(1, 2, 3, HEAD_DIM)
    assert oprf_parameter(zeros, zeros) == 0.0


def test_smreg_rows_lie_on_the_sphere_and_others_do_not():
    lengths = make("smreg").weight.norm(dim=1) * HEAD_DIM**0.25
    torch.testing.assert_close(lengths, torch.full_like(lengths, HEAD_DIM**0.5), rtol=1e-12, atol=0)
    assert make("softmax").weight.norm(dim=1).std() > 0.05


def test_relu_without_projection_has_head_dim_features_whatever_is_asked_for():
    assert feature_map("relu_direct", 256, HEAD_DIM).features == HEAD_DIM


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernel": "sotfmax"}, "unknown kernel 'sotfmax'; the kernels are softmax, hyperbolic"),
        ({"projection": "gaussian"}, "unknown projection 'gaussian'; the projections are orthogonal, iid"),
        ({"kernel": "hyperbolic", "features": 7}, "features=7 is odd"),
        ({"kernel": "trigonometric", "features": 7}, "features=7 is odd"),
        ({"kernel": "oprf", "oprf_a": 0.1}, "0 or below; got 0.1"),
        ({"kernel": "oprf", "oprf_a": math.nan}, "finite number"),
        ({"kernel": "relu", "oprf_a": -0.1}, "belongs to kernel 'oprf'"),
        ({"kernel": "aderf", "oprf_a": (-0.1, math.inf)}, "finite number"),
        ({"kernel": "oprf", "oprf_a": (-0.1,) * 8}, "only sderf and aderf"),
        ({"dtype": torch.bfloat16}, "float32 or torch.float64"),
        ({"features": 0}, "features must be an integer from 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, sentence):
    options = {"kernel": "softmax", "features": 8, "head_dim": 4, **change}
    with pytest.raises(ValueError, match=sentence):
        feature_map(**options)
