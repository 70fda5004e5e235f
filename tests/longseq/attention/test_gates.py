"""Forget gates against the quadratic formula in float64: all ways through attention, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.longseq.attention import cases
from torch import Tensor

from longseq.attention import FavorAttention, exact_attention, favor_attention
from longseq.attention.backends.native import build
from longseq.attention.call import Call
from longseq.attention.carried import carried_attention
from longseq.attention.feature_maps import feature_map
from longseq.attention.recurrent import decode, prefill, prefill_exact
from longseq.attention.reference import quadratic_attention
from longseq.attention.scan import Rows

LENGTH = 150
RATES = torch.tensor([0.01, 0.1, 0.5])
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=f"no native kernels: {build.unavailable()}")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(length: int = LENGTH) -> list[Tensor]:
    """q, k, v, and log-gates between nearly 0 and −5."""
    gate = F.logsigmoid(2 * numbers(cases.BATCH, cases.HEADS, length, seed=7) + 0.5)
    return [*cases.inputs(length), gate.requires_grad_()]


def some(rate: float, length: int = LENGTH) -> Tensor:
    return torch.rand(cases.BATCH, length, generator=torch.Generator().manual_seed(3)) < rate


def assert_equal(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert ((one - other).abs().max() / other.abs().max()).item() < tolerance


def with_gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    direction = numbers(*out.shape, seed=1).to(out)
    return out.detach(), *torch.autograd.grad(out, inputs, direction)


DOCUMENTS = {"segments": some(0.05).cumsum(1), "key_padding": some(0.8)}
WAYS: dict[str, dict] = {
    "causal": {"causal": True},
    "bidirectional": {},
    "window": {"causal": True, "window": 7},
    "a window of several chunks": {"causal": True, "window": 100},
    "window on both sides": {"window": 7},
    "packed": {"causal": True, **DOCUMENTS},
    "packed window": {"causal": True, "window": 7, **DOCUMENTS},
    "packed on both sides": {"window": 7, **DOCUMENTS},
    "relu": {"causal": True, "window": 7, "kernel": "relu"},
}


@backends
@pytest.mark.parametrize("way", WAYS)
def test_features_and_window_have_the_formulas_outputs_and_gradients(way: str, backend: str) -> None:
    q, k, v, gate = ours = given()
    exact = [x.detach().double().requires_grad_() for x in ours]
    out = favor_attention(q, k, v, gate=gate, features=cases.FEATURES, backend=backend, **WAYS[way])
    wanted = cases.reference(*exact[:3], gate=exact[3], **WAYS[way])
    assert_equal(with_gradients(out, ours), with_gradients(wanted, exact))


@pytest.mark.parametrize("way", [{"causal": True}, {}, {"causal": True, **DOCUMENTS}, DOCUMENTS])
def test_exact_attention_has_the_formulas_outputs_and_gradients(way: dict) -> None:
    q, k, v, gate = ours = given()
    exact = [x.detach().double().requires_grad_() for x in ours]
    wanted = quadratic_attention(*exact[:3], None, kernel="relu_direct", window=LENGTH, gate=exact[3], **way)
    assert_equal(with_gradients(exact_attention(q, k, v, gate=gate, **way), ours), with_gradients(wanted, exact))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 7])
def test_a_constant_decay_is_the_gate_of_its_rate(causal: bool, window: int) -> None:
    q, k, v, _ = given()
    rates, options = RATES.clone().requires_grad_(), {"causal": causal, "window": window, "features": cases.FEATURES}
    gated = favor_attention(q, k, v, gate=-rates[:, None].expand(cases.BATCH, -1, LENGTH), **options)
    decayed = favor_attention(q, k, v, decay=rates, **options)
    assert_equal(with_gradients(gated, [q, k, v, rates]), with_gradients(decayed, [q, k, v, rates]))


@pytest.mark.parametrize("causal", [True, False])
def test_a_gate_of_zero_forgets_all_as_a_documents_border_does(causal: bool) -> None:
    q, k, v, _ = (x.detach() for x in given())
    gate, segments = torch.zeros(cases.BATCH, cases.HEADS, LENGTH), torch.zeros(cases.BATCH, LENGTH, dtype=torch.long)
    gate[..., 70], segments[:, 70:] = -torch.inf, 1
    for window in (0, 7):
        options = {"causal": causal, "window": window, "features": cases.FEATURES}
        whole = favor_attention(q, k, v, gate=gate, **options)
        assert_equal((whole,), (favor_attention(q, k, v, segments=segments, **options),))


@backends
@pytest.mark.parametrize("window", [0, 7])
def test_a_later_gate_changes_no_bit_of_an_earlier_output(window: int, backend: str) -> None:
    q, k, v, gate = (x.detach() for x in given())
    options = {"causal": True, "window": window, "features": cases.FEATURES, "backend": backend}
    before = favor_attention(q, k, v, gate=gate, **options)
    for value in (-3.0, torch.nan):
        changed = gate.clone()
        changed[..., 100] = value
        assert torch.equal(favor_attention(q, k, v, gate=changed, **options)[:, :, :100], before[:, :, :100])


@backends
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 7, LENGTH])
def test_a_gate_that_is_nan_is_seen_by_those_who_see_its_key(causal: bool, window: int, backend: str) -> None:
    *qkv, gate = (x.detach() for x in given())
    segments = torch.arange(LENGTH).div(50, rounding_mode="floor").expand(cases.BATCH, LENGTH)
    broken = gate.clone()
    broken[1, 2, 70] = torch.nan

    def found(gate: Tensor) -> Tensor:
        if window == LENGTH:
            return exact_attention(*qkv, gate=gate, causal=causal, segments=segments)
        options = {"window": window, "features": cases.FEATURES, "backend": backend}
        return favor_attention(*qkv, gate=gate, causal=causal, segments=segments, **options)

    reached = torch.zeros(cases.BATCH, cases.HEADS, LENGTH, dtype=torch.bool)
    reached[1, 2, 70 if causal else 50 : 100] = True
    before, after = found(gate), found(broken)
    assert after[reached].isnan().all()
    torch.testing.assert_close(after[~reached], before[~reached])


@pytest.mark.parametrize("window", [0, 7])
def test_a_gate_that_is_nan_is_passed_on_by_decoding_and_by_tiles(window: int) -> None:
    inputs = [x.detach() for x in given()]
    options = {"window": window, "features": cases.FEATURES}
    *qkv, gate = inputs
    whole = favor_attention(*qkv, gate=gate, causal=True, **options)
    for broken in (10, 70):  # of what is read first, and of what follows
        gate = inputs[3].clone()
        gate[1, 2, broken] = torch.nan
        first, later = ([x[:, :, :40] for x in (*qkv, gate)], [x[:, :, 40:] for x in (*qkv, gate)])
        out, state = prefill(*first[:3], gate=first[3], **options)
        decoded = torch.cat((out, decode(*later[:3], state, later[3])[0]), 2)
        out, state = carried_attention(*first[:3], (), Call.of(gate=first[3], **options))
        tiled = torch.cat((out, carried_attention(*later[:3], state, Call.of(gate=later[3], **options))[0]), 2)
        for found in (decoded, tiled):
            assert found[1, 2, broken:].isnan().all()
            assert_equal((found[1, 2, :broken], found[0]), (whole[1, 2, :broken], whole[0]))


@backends
@pytest.mark.parametrize("bias", [3.0, 8.0])
def test_gradients_of_gates_are_right_at_16384_positions(bias: float, backend: str) -> None:
    q, k, v, x = (numbers(1, 1, 16_384, 8, seed=seed) for seed in range(4))

    def found(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        gate = F.logsigmoid(x[..., 0].to(dtype) + bias).requires_grad_()
        out = favor_attention(
            *(t.to(dtype) for t in (q, k, v)), gate=gate, causal=True, features=16, backend=backend
        )  # fmt: skip
        return with_gradients(out, [gate])

    assert_equal(found(torch.float32, backend), found(torch.float64, "torch"), 3e-5)


@pytest.mark.parametrize("prompt", [0, 1, 67])
@pytest.mark.parametrize("window", [0, 7, 200])
def test_decoding_goes_on_as_the_whole_does(prompt: int, window: int) -> None:
    inputs = [x.detach() for x in given()]
    *first, seen = (x[:, :, :prompt] for x in inputs)
    *rest, later = (x[:, :, prompt:] for x in inputs)
    options = {"window": window, "features": cases.FEATURES}
    *qkv, gate = inputs
    out, state = prefill(*first, gate=seen, **options)
    whole = favor_attention(*qkv, gate=gate, causal=True, **options)
    assert_equal((torch.cat((out, decode(*rest, state, later)[0]), 2),), (whole,))
    out, state = prefill_exact(*first, gate=seen)
    chosen = state.select(torch.tensor([1, 0]))
    swapped = decode(*(x.flip(0) for x in rest), chosen, later.flip(0))[0].flip(0)
    assert_equal((torch.cat((out, swapped), 2),), (exact_attention(*qkv, gate=gate, causal=True),))


@backends
@pytest.mark.parametrize("window", [0, 7, 40])
@pytest.mark.parametrize("wide", [True, False])
def test_tiles_that_carry_a_state_are_the_whole(window: int, wide: bool, backend: str) -> None:
    *qkv, gate = inputs = given()
    options = {"window": window, "features": cases.FEATURES, "backend": backend}
    whole = favor_attention(*qkv, gate=gate, causal=True, **options)
    outs, state = [], ()
    with torch.set_grad_enabled(not wide):
        for start, stop in ((0, 64), (64, 104), (104, 145), (145, LENGTH)):
            tile = [x[:, :, start:stop] for x in inputs]
            out, state = carried_attention(*tile[:3], state, Call.of(gate=tile[3], **options), wide=wide)
            outs.append(out)
    out = torch.cat(outs, dim=2)
    if wide:
        assert_equal((out,), (whole.detach(),))
    else:
        assert_equal(with_gradients(out, inputs), with_gradients(whole, inputs))


@pytest.mark.parametrize("window", [0, 7])
def test_a_fresh_module_forgets_as_a_learned_decay_does_and_then_reads_the_token(window: int) -> None:
    x = numbers(2, 50, 24)
    torch.manual_seed(0)
    gated = FavorAttention(24, 3, causal=True, window=window, features=16, forget_gate=True)
    decayed = FavorAttention(24, 3, causal=True, window=window, features=16, learned_decay=True)
    decayed.load_state_dict(gated.state_dict(), strict=False)
    assert gated.gate is not None
    rates = 2.0 ** (-8 * torch.arange(1, 4) / 3)
    torch.testing.assert_close(gated.gate(x), -rates[None, :, None].expand(2, 3, 50))
    assert_equal((gated(x),), (decayed(x),))
    gated(x).square().sum().backward()
    assert gated.gate.weight.grad.abs().amin(1).gt(0).all()
    with torch.no_grad():
        gated.gate.weight.add_(numbers(3, 24, seed=2))
        q, k, v = gated.project(x)
        log_gates = F.logsigmoid(x @ gated.gate.weight.mT + gated.gate.bias).mT
        mixed = favor_attention(q, k, v, causal=True, window=window, features=16, gate=log_gates)
        torch.testing.assert_close(gated(x), gated.merge(mixed))


def test_operators_with_gates_are_traced_as_they_compute() -> None:
    phi = feature_map("softmax", 16, 8)
    q, k, v = (numbers(2, 70, 8, seed=seed).requires_grad_() for seed in range(3))
    gate = F.pad(-numbers(2, 70, seed=4).abs().double().cumsum(1), (1, 0))[..., None].requires_grad_()
    given = (*Rows(q, k, v).qkv, gate, None, None, *phi.parts(), "torch")
    state = numbers(2, 16, 9, seed=5).requires_grad_(), torch.zeros(2, 1, 1)
    torch.library.opcheck(torch.ops.longseq.scan, (*given, 3, True, True, *state))
    torch.library.opcheck(torch.ops.longseq.window, (*given, 7, False))


def test_what_does_not_fit_together_is_refused() -> None:
    q, k, v, gate = (x.detach() for x in given(9))
    with pytest.raises(ValueError, match=r"gate must be of shape \(2, 3, 9\); got \(2, 3, 8\)"):
        favor_attention(q, k, v, causal=True, gate=gate[..., 1:])
    with pytest.raises(ValueError, match="give decay or gate, not both"):
        favor_attention(q, k, v, causal=True, gate=gate, decay=RATES)
    with pytest.raises(ValueError, match="forget_gate=true and learned_decay=true"):
        FavorAttention(24, 3, causal=True, forget_gate=True, learned_decay=True)
    _, state = prefill(q, k, v, gate=gate, features=8)
    with pytest.raises(ValueError, match="the state continues with a gate of shape"):
        decode(q, k, v, state)
    _, state = prefill(q, k, v, features=8)
    with pytest.raises(ValueError, match="has begun without gates"):
        decode(q, k, v, state, gate)
