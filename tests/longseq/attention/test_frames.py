"""Kernels "sderf" and "aderf": unbiased in any coordinates, of the closed form's variance, and least where it says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from longseq.attention import FavorAttention, favor_attention
from longseq.attention.feature_maps import feature_map
from longseq.attention.frames import best_frame, frame_moments
from longseq.attention.oprf import oprf_parameter
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec
from longseq.models.weights import load_body, save_weights

D, HEADS = 4, 2
KERNELS = pytest.mark.parametrize("kernel", ["sderf", "aderf"])


def inputs(queries: int, keys: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """(1, HEADS, L, D): as of a trained layer, with means, and directions that are large in q and small in k."""
    rng = torch.Generator().manual_seed(3)
    q = torch.randn(1, HEADS, queries, D, generator=rng, dtype=torch.float64)
    k = torch.randn(1, HEADS, keys, D, generator=rng, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(HEADS, D, D, generator=rng, dtype=torch.float64))[0]
    q = q * torch.tensor([1.6, 0.2, 0.7, 0.4]) @ turn + torch.tensor([0.5, 0.0, 0.3, -0.2])
    k = k * torch.tensor([0.2, 1.2, 0.7, 0.4]) @ turn + torch.tensor([-0.5, 0.7, 0.2, 0.0])
    return size * q, size * k


def framed(kernel: str, q: Tensor, k: Tensor):
    """q' and k' of the first head, c, and A."""
    to_q, to_k, centre, a = best_frame(kernel, frame_moments(q, k))
    return q[0, 0] @ to_q[0].T, (k[0, 0] - centre[0]) @ to_k[0].T, centre[0], tuple(a.tolist())


def single(kernel: str, q: Tensor, k: Tensor, a: object, draws: int) -> Tensor:
    """φ(q)φ(k) of single projections, (draws, Lq, Lk)."""
    many = feature_map(kernel, draws, D, oprf_a=a, projection="iid", dtype=torch.float64)
    (fq, q_scale), (fk, k_scale) = many.queries(q), many.keys(k)
    return ((fq * q_scale.exp())[:, None] * (fk * k_scale.exp())).permute(2, 0, 1) * draws


def log_moment(z: Tensor, a: Tensor) -> Tensor:
    """log E[(φ(x)φ(y))²]/exp(xᵀy)², straight from the Gaussian integral over ω with its matrices, not coordinates."""
    s, t = torch.eye(D).to(a) - 4 * torch.diag(a), torch.eye(D).to(a) - 8 * torch.diag(a)
    quadratic = (z @ (2 * s @ torch.linalg.inv(t)) * z).sum(-1)
    return torch.logdet(s) - torch.logdet(t) / 2 + quadratic - z.square().sum(-1)


@KERNELS
def test_the_mean_over_draws_is_the_softmax_weight_times_a_factor_of_the_query(kernel):
    q, k = inputs(3, 5, 0.7)
    x, y, centre, a = framed(kernel, q, k)
    found = single(kernel, x, y, a, 400_000) * torch.exp(q[0, 0] @ centre / D**0.5)[:, None]
    exact = torch.exp(q[0, 0] @ k[0, 0].T / D**0.5)
    error = found.std(0) / len(found) ** 0.5
    assert (error / exact).max() < 0.02, "too few draws to say"
    assert ((found.mean(0) - exact).abs() / error).max() < 4


@KERNELS
def test_the_variance_is_that_of_the_closed_form(kernel):
    q, k = inputs(3, 5, 0.5)
    x, y, _, a = framed(kernel, q, k)
    squares = (single(kernel, x, y, a, 400_000) / torch.exp(x @ y.T / D**0.5)).square()
    closed = log_moment((x[:, None] + y) * D**-0.25, torch.tensor(a, dtype=torch.float64)).exp()
    error = squares.std(0) / len(squares) ** 0.5
    assert (error / closed).max() < 0.03, "too few draws to say"
    assert ((squares.mean(0) - closed).abs() / error).max() < 4
    assert closed.max() > 1.2  # and not a variance of nothing


@KERNELS
def test_every_other_choice_of_the_constants_has_more_variance(kernel):
    """The mean over all pairs of both heads, next to small steps of R, c and A in random directions, both ways."""
    q, k = inputs(40, 50)
    to_q, _, centre, a = best_frame(kernel, frame_moments(q, k))

    def mean_moment(to_q: Tensor, centre: Tensor, a: Tensor) -> float:
        to_k = torch.linalg.inv(to_q).mT
        x, y = q[0] @ to_q.mT, (k[0] - centre[:, None]) @ to_k.mT
        return log_moment((x[:, :, None] + y[:, None]) * D**-0.25, a).mean().item()

    least = mean_moment(to_q, centre, a)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 0.05 * torch.randn(HEADS, D, D, generator=rng, dtype=torch.float64)
        if kernel == "sderf":  # the best of rotations
            step = step - step.mT
        turned = torch.linalg.matrix_exp(step) @ to_q
        moved = centre + 0.2 * torch.randn(HEADS, D, generator=rng, dtype=torch.float64)
        other = a * torch.exp(0.2 * torch.randn(D, generator=rng, dtype=torch.float64))
        assert mean_moment(turned, centre, a) > least
        assert mean_moment(to_q, moved, a) > least
        assert mean_moment(to_q, centre, other) > least


def test_sharper_features_estimate_attention_better_than_plainer_ones():
    """Mean squared relative error of single weights, q and k with means and unequal directions."""
    q, k = inputs(40, 50)
    exact = q[0, 0] @ k[0, 0].T / D**0.5

    def error(kernel: str, x: Tensor, y: Tensor, a: object, log_weight: Tensor) -> float:
        found = single(kernel, x, y, a, 4096).unflatten(0, (-1, 64)).mean(1)
        return ((found / log_weight.exp() - 1).square()).mean().item()

    errors = {"softmax": error("softmax", q[0, 0], k[0, 0], 0.0, exact)}
    for kernel in ("sderf", "aderf"):
        x, y, _, a = framed(kernel, q, k)
        errors[kernel] = error(kernel, x, y, a, x @ y.T / D**0.5)
    assert errors["aderf"] < 0.7 * errors["sderf"] < 0.2 * errors["softmax"]


def test_moments_add_up_over_batches_and_slices():
    q, k = inputs(7, 9)
    parts = frame_moments(q[:, :, :3], k[:, :, :8]) + frame_moments(q[:, :, 3:], k[:, :, 8:])
    for found, whole in zip(best_frame("aderf", parts), best_frame("aderf", frame_moments(q, k)), strict=True):
        torch.testing.assert_close(found, whole)


@KERNELS
def test_degenerate_moments_still_give_finite_constants(kernel):
    """One position: no variance at all."""
    q, k = inputs(1, 1)
    to_q, to_k, centre, a = best_frame(kernel, frame_moments(q, k))
    torch.testing.assert_close(to_q.mT @ to_k, torch.eye(D).double().expand(HEADS, D, D))
    assert centre.isfinite().all()
    assert (a <= 0).all()


# a layer's


def build(**options: object) -> FavorAttention:
    torch.manual_seed(0)
    module = FavorAttention(12, HEADS, causal=True, options=None, **{"features": 16, "kernel": "aderf", **options})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def sample(length: int = 23) -> Tensor:
    return torch.randn(2, length, 12, generator=torch.Generator().manual_seed(5)) + 0.3


def calibrated(**options: object) -> FavorAttention:
    module = build(**options).train()
    module(sample())
    return module


@KERNELS
def test_the_first_training_pass_fixes_the_constants_and_uses_them(kernel):
    module, x = build(kernel=kernel), sample()
    module.eval()(x)
    assert module.frame.a is None  # evaluation before training decides nothing
    found = module.train()(x)
    q, k, v = module.project(x)
    to_q, to_k, centre, a = best_frame(kernel, frame_moments(q, k))
    assert module.frame.a == tuple(a.tolist())
    q, k = q.double() @ to_q.mT, (k.double() - centre[:, None]) @ to_k.mT
    mixed = favor_attention(q, k, v.double(), causal=True, kernel=kernel, features=16, oprf_a=module.frame.a)
    torch.testing.assert_close(found, module.out(mixed.float().transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)
    fixed = module.frame.constants.clone()
    module(3 * x)
    assert torch.equal(module.frame.constants, fixed)
    assert torch.equal(module(x), found)


def test_padding_does_not_enter_the_constants():
    x, padding = sample(), torch.ones(2, 23, dtype=torch.bool)
    padding[1, 15:] = False
    other = x.clone()
    other[1, 15:] = 100.0
    found = []
    for rows in (x, other):
        module = build().train()
        module(rows, padding=padding)
        found.append(module.frame.a)
    assert found[0] == found[1] != calibrated().frame.a


def test_padding_alone_and_overflow_leave_the_constants_open():
    module = build().train()
    module(sample(), padding=torch.zeros(2, 23, dtype=torch.bool))
    module(torch.full((2, 23, 12), math.inf))
    assert module.frame.a is None
    module(sample())
    assert module.frame.a == calibrated().frame.a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_constants_are_saved_and_loaded_to_the_last_bit_in_any_precision(dtype):
    trained = copy.deepcopy(calibrated()).to(dtype)
    fresh = build().to(dtype)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert fresh.frame.a == trained.frame.a == calibrated().frame.a
    assert torch.equal(fresh.frame.constants, trained.frame.constants)


def test_kernels_exchange_their_checkpoints():
    sharp, plain, optimal = calibrated(), build(kernel="softmax"), build(kernel="oprf")
    for other in (plain, optimal):
        other.load_state_dict(sharp.state_dict(), strict=True)
        assert not any("frame" in name for name in other.state_dict())
    sharp.load_state_dict(plain.state_dict(), strict=True)
    assert sharp.frame.a is None  # to be fixed at the first training step here
    sharp.train()(sample())
    assert sharp.frame.a == calibrated().frame.a


@pytest.mark.parametrize(("kernel", "other"), [("sderf", "aderf"), ("aderf", "sderf")])
def test_constants_of_the_other_sharper_kernel_are_found_anew(kernel, other):
    """As in fine-tuning with another kernel; its own it takes as they are."""
    theirs = calibrated(kernel=other).state_dict()
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    module = build(kernel=kernel)
    module.load_state_dict(theirs, strict=True)
    assert module.frame.a is None
    found = module.train()(sample())
    assert module.frame.a == calibrated(kernel=kernel).frame.a
    assert torch.equal(found, calibrated(kernel=kernel)(sample()))
    assert all(torch.equal(before[name], tensor) for name, tensor in theirs.items())
    module.load_state_dict(calibrated(kernel=kernel).state_dict(), strict=True)
    assert torch.equal(module(sample()), found)


def test_a_body_that_is_fine_tuned_with_another_sharper_kernel_finds_its_constants_anew(tmp_path):
    def model(kernel: str) -> PerformerLM:
        torch.manual_seed(0)
        return PerformerLM(
            PerformerSpec(vocabulary=9, causal=True, dim=12, depth=1, heads=3, ffn_dim=8, kernel=kernel, features=8)
        )

    tokens = torch.arange(18).view(2, 9) % 9
    trained, other, same = (model(kernel).train() for kernel in ("sderf", "aderf", "sderf"))
    trained(tokens)
    save_weights(trained.state_dict(), tmp_path / "model.safetensors")
    for each in (other, same):
        load_body(each, tmp_path / "model.safetensors")
    assert other.blocks[0].attention.frame.a is None
    assert same.blocks[0].attention.frame.a == trained.blocks[0].attention.frame.a is not None


@pytest.mark.parametrize("window", [0, 5])
def test_causal_output_ignores_later_keys(window):
    module, x = calibrated(window=window, learned_covariance=True).eval(), sample()
    other = x.clone()
    other[:, 11:] = 7.0
    assert torch.equal(module(x)[:, :11], module(other)[:, :11])


def test_inside_a_window_as_long_as_the_row_weights_are_exact():
    """Turned and moved queries and keys have the weights of the untouched ones."""
    module, x = calibrated(window=64).eval(), sample()
    q, k, v = module.project(x)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(module(x), module.out(mixed.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)


# learned covariance


@pytest.mark.parametrize("options", [{}, {"kind": "exact"}, {"kernel": "softmax", "window": 5}])
def test_a_learned_covariance_is_that_of_the_kernel(options):
    """exp(qᵀMᵀMk/√D): the same attention as of a layer whose queries and keys are multiplied by M."""
    module = build(kernel=options.pop("kernel", "relu"), learned_covariance=True, **options).double().eval()
    x = sample().double()
    q, k, v = module.project(x)
    metric = torch.eye(6).double() + module.frame.covariance
    q, k = q @ metric.mT, k @ metric.mT
    plain = build(**{"kernel": "relu", **module.options.__dict__, "learned_covariance": False}).double()
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if "frame" not in n})
    torch.testing.assert_close(module(x), plain.merge(plain.mix(q, k, v, None, None)))


@pytest.mark.parametrize("kernel", ["softmax", "aderf"])
def test_gradients_of_a_learned_covariance_are_those_of_finite_differences(kernel):
    module = build(kernel=kernel, learned_covariance=True, window=3, backend="torch").double().train()
    with torch.no_grad():
        module.frame.covariance.mul_(0.2)
    x = sample(9).double()
    module(x)
    weight = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (weight * module(x)).sum().backward()
    found, step = module.frame.covariance.grad.clone(), 1e-6
    with torch.no_grad():
        for at in [(0, 1, 2), (1, 0, 0), (1, 5, 3)]:
            ends = []
            for sign in (1, -1):
                module.frame.covariance[at] += sign * step
                ends.append((weight * module(x)).sum().item())
                module.frame.covariance[at] -= sign * step
            assert found[at].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_oprf_finds_its_constant_behind_a_learned_covariance():
    module = calibrated(kernel="oprf", learned_covariance=True)
    q, k, _ = module.project(sample())
    assert module.call().oprf_a == pytest.approx(oprf_parameter(*module.framed(q, k)), abs=1e-9)
    assert module.call().oprf_a < -1e-3


def test_a_learned_covariance_begins_as_none():
    torch.manual_seed(0)
    plain = FavorAttention(12, HEADS, causal=True, features=16)
    torch.manual_seed(0)
    learned = FavorAttention(12, HEADS, causal=True, features=16, learned_covariance=True)
    torch.testing.assert_close(plain(sample()), learned(sample()))


@pytest.mark.parametrize("how", [{"activation_checkpointing": True}, {"sequence_tile": 32}])
def test_the_first_step_has_the_same_gradients_recomputed_and_in_tiles(how):
    """Where a block is computed again its constants are there already."""
    sizes = {"vocabulary": 11, "dim": 24, "depth": 2, "heads": 3, "ffn_dim": 20, "causal": True, "features": 16}
    tokens, targets = torch.randint(11, (2, 2, 90), generator=torch.Generator().manual_seed(2))
    found = []
    for more in ({}, how):
        torch.manual_seed(0)
        model = PerformerLM(PerformerSpec(**sizes, kernel="aderf", learned_covariance=True, window=5, **more)).train()
        assert model.spec.parameter_count == sum(weight.numel() for weight in model.parameters())
        model(tokens, targets=targets)[0].backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
        assert all(block.attention.calibrated for block in model.blocks)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
