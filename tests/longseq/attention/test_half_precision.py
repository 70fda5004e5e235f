"""bf16 and fp16 inputs: every way to compute attention has the projection rounded once, and sums in fp32."""

from __future__ import annotations

import pytest
import torch
from tests.longseq.attention import cases
from torch import Tensor

from longseq.attention import KERNELS, decode, favor_attention, prefill
from longseq.attention.call import Call
from longseq.attention.carried import State, carried_attention
from longseq.attention.feature_maps import feature_map

LENGTH, WINDOW = 75, 7
STDS = (0.5, 1.0, 2.0)
DECAY, SHARE = torch.tensor([0.0, 0.02, 0.3]), torch.tensor([-1.0, 0.0, 0.5])

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
stds = pytest.mark.parametrize("std", STDS)
windows = pytest.mark.parametrize("window", [0, WINDOW])


def half(std: float, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in cases.inputs(LENGTH, std)]


def options(window: int) -> dict[str, object]:
    return {"window": window, "decay": DECAY, **({"far_share": SHARE} if window else {})}


def tiles(q: Tensor, k: Tensor, v: Tensor, **asked: object) -> Tensor:
    state: State = ()
    parts = []
    for start in range(0, LENGTH, 30):
        out, state = carried_attention(*(x[:, :, start : start + 30] for x in (q, k, v)), state, Call.of(**asked))
        parts.append(out)
    return torch.cat(parts, dim=2)


def tokens(q: Tensor, k: Tensor, v: Tensor, **asked: object) -> Tensor:
    prompt = [x[:, :, :40] for x in (q, k, v)]
    first, state = prefill(*prompt, **asked)
    return torch.cat((first, decode(*(x[:, :, 40:] for x in (q, k, v)), state)[0]), dim=2)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """As if computed in fp32 and rounded at the end."""
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * torch.finfo(found.dtype).eps, atol=2e-5)


@halves
@stds
@windows
@pytest.mark.parametrize("way", ["torch", "native", "carried", "decoded"])
def test_every_way_equals_float64_with_the_same_rounded_projection(way, dtype, std, window):
    qkv, asked = half(std, dtype), options(window)
    expected = cases.reference(*qkv, causal=True, operands=dtype, **asked)
    asked["features"] = cases.FEATURES
    if way == "carried":
        out = tiles(*qkv, **asked)
    elif way == "decoded":
        out = tokens(*qkv, **asked)
    else:
        out = favor_attention(*qkv, causal=True, backend=way, **asked)
    assert out.dtype == dtype
    assert_rounded(out, expected)


@halves
@stds
@windows
@pytest.mark.parametrize("way", ["torch", "native", "carried"])
def test_every_gradient_equals_float64_with_the_same_rounded_projection(way, dtype, std, window):
    qkv, asked = half(std, dtype), options(window)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    wanted = cases.reference(*exact, causal=True, operands=dtype, **asked)
    asked["features"] = cases.FEATURES
    out = tiles(*qkv, **asked) if way == "carried" else favor_attention(*qkv, causal=True, backend=way, **asked)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, qkv, direction)
    for name, one, other in zip("qkv", found, torch.autograd.grad(wanted, exact, direction.double()), strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).norm() / other.norm()
        assert error < 5e-3, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("std", [2.0, *(pytest.param(std, marks=pytest.mark.long) for std in STDS[:2])])
def test_triton_equals_float64_with_the_same_rounded_projection(std):
    """Features, weights and values are operands, too: their rounding shows."""
    pytest.importorskip("triton")
    qkv, asked = half(std, torch.bfloat16), options(WINDOW)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = cases.reference(*exact, causal=True, operands=torch.bfloat16, **asked)
    out = favor_attention(*qkv, causal=True, backend="triton", features=cases.FEATURES, **asked)
    assert (out.double() - expected).norm() < 5e-3 * expected.norm()
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.autograd.grad(out, qkv, direction)
    for name, one, other in zip("qkv", found, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 5e-3, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_projection_is_rounded_in_every_kernel(kernel, backend):
    a = {"oprf": -0.05, "aderf": tuple(-0.005 * place for place in range(16))}.get(kernel, 0.0)
    common = 1.0 if kernel in cases.SIGNED else 0.0  # keeps signed sums from cancelling
    qkv = [x.detach().bfloat16() for x in cases.inputs(70, 0.3, common=common)]
    expected = cases.reference(*qkv, kernel=kernel, causal=True, oprf_a=a, operands=torch.bfloat16)
    unrounded = cases.reference(*qkv, kernel=kernel, causal=True, oprf_a=a)
    out = favor_attention(*qkv, kernel=kernel, causal=True, oprf_a=a, features=cases.FEATURES, backend=backend)
    if kernel != "relu_direct":  # its rows are a half: 16^-1/4
        assert (expected - unrounded).abs().max() > 1e-4
    assert_rounded(out, expected)


@halves
def test_the_rounded_weight_is_exact_in_its_dtype_and_held_in_fp32(dtype):
    rounded, plain = (feature_map("softmax", 40, 24, operands=operands) for operands in (dtype, None))
    assert rounded.weight.dtype == torch.float32
    assert torch.equal(rounded.weight.to(dtype).float(), rounded.weight)
    assert not torch.equal(rounded.weight, plain.weight)
    torch.testing.assert_close(rounded.weight, plain.weight, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_operands_of_several_dtypes_are_widened_and_the_projection_is_not_rounded():
    q, k, v = (x.detach() for x in cases.inputs(70))
    mixed = favor_attention(q.bfloat16(), k, v, causal=True, features=cases.FEATURES)
    assert torch.equal(mixed, favor_attention(q.bfloat16().float(), k, v, causal=True, features=cases.FEATURES))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_half_precision_layer_keeps_half_precision_for_its_gradient(causal, backend):
    """No copy in fp32 of q, k or v is kept: what is saved of them is what was given."""
    q, k, v = half(1.0, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        favor_attention(q, k, v, causal=causal, features=cases.FEATURES, backend=backend)
    wide = [x for x in kept if x.dtype == torch.float32 and x.shape[-1] == cases.HEAD_DIM and x.shape[-2] == LENGTH]
    assert not wide
    assert sum(x.dtype == torch.bfloat16 for x in kept) == 3
