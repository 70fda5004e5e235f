"""Near and far keys in one autograd function, as on a GPU, against the reference and the separate operators."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from tests.longseq.attention import cases
from tests.longseq.attention.own_kernels import DEVICE

from longseq.attention import FavorAttention, favor_attention, fused, near_and_far

pytest.importorskip("triton")

from longseq.attention.backends.triton import launch as triton_launch
from longseq.attention.backends.triton import scan as triton_backend
from longseq.attention.backends.triton import window as triton_window

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes both sides of every tl.where
    pytest.mark.skipif(DEVICE != "cpu" or not triton_launch.INTERPRETED, reason="kernels are not interpreted"),
]


@pytest.fixture(autouse=True)
def one_function(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """CPU tensors go the way of a GPU's; each call is noted."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(fused, "ELSEWHERE", True)
    monkeypatch.setattr(triton_backend, "PROGRAMS", 12)
    monkeypatch.setattr(triton_window, "STEP_FP32", 64)
    calls: list[int] = []
    function = near_and_far.near_and_far

    def noted(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(near_and_far, "near_and_far", noted)
    yield calls
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [("far_share",), ("decay", "segments", "key_padding"), ("gate", "far_share")])
def test_near_and_far_equal_the_quadratic_reference_with_all_gradients(one_function, monkeypatch, options):
    length = 150
    given = {
        "far_share": torch.tensor([-1.0, 0.0, 0.5]),
        "decay": torch.tensor([0.0, 0.01, 0.1]),
        "gate": -torch.rand(cases.BATCH, cases.HEADS, length, generator=torch.Generator().manual_seed(4)),
        "segments": (torch.arange(length) // 70).expand(cases.BATCH, -1),
        "key_padding": torch.rand(cases.BATCH, length, generator=torch.Generator().manual_seed(0)) > 0.2,
    }
    q, k, v = cases.inputs(length, std=0.5)
    monkeypatch.setattr(cases, "favor_attention", functools.partial(favor_attention, backend="triton"))
    cases.assert_equals_reference(q, k, v, 2e-5, causal=True, window=20, **{name: given[name] for name in options})
    assert one_function == [1]


def test_near_and_far_in_bf16_equal_the_separate_operators(one_function, monkeypatch):
    rows = [x[:1].detach().bfloat16() for x in cases.inputs(130)]
    learned = [torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([0.0, 0.01, 0.1])]
    found = []
    for together in (True, False):
        monkeypatch.setattr(fused, "ELSEWHERE", together)
        given = [x.clone().requires_grad_() for x in (*rows, *learned)]
        q, k, v, share, decay = given
        out = favor_attention(
            q, k, v, causal=True, window=70, features=cases.FEATURES, far_share=share, decay=decay, backend="triton"
        )
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append([out, *torch.autograd.grad(out, given, direction)])
    assert one_function == [1]
    assert found[0][0].transpose(1, 2).is_contiguous()
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - other.double()).norm() < 5e-3 * other.double().norm()


@pytest.mark.parametrize(
    ("window", "learned"), [(5, ("learned_share",)), (5, ("learned_decay", "learned_share")), (0, ("learned_decay",))]
)
def test_log_decay_and_share_of_a_layer_learn_as_by_the_separate_operators(one_function, monkeypatch, window, learned):
    layer = FavorAttention(
        24, 3, causal=True, window=window, features=16, backend="triton", **dict.fromkeys(learned, True)
    )
    x = torch.randn(1, 41, 24, generator=torch.Generator().manual_seed(2))
    found = []
    for together in (True, False):
        monkeypatch.setattr(fused, "ELSEWHERE", together)
        out = layer(x)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        found.append([out, *torch.autograd.grad(out, list(layer.parameters()), direction)])
    assert one_function == [1] * (window > 0)
    assert len(found[0]) == 3 + len(learned)
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert other.norm() > 0
        assert (one - other).norm() < 1e-5 * other.norm()
