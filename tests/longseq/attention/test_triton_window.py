"""The Triton window with bf16 and fp16 operands, against the PyTorch operation in float64 with the same ones."""

from __future__ import annotations

import pytest
import torch
from tests.longseq.attention.own_kernels import (
    DEVICE,
    double,
    poison_hidden,
    results,
    rows,
    window_attention,
)

pytest.importorskip("triton")

from longseq.attention.backends.triton import launch as triton_launch

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not triton_launch.INTERPRETED, reason="no GPU, and triton was imported uninterpreted"
    ),
]
OPERANDS = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _half(length: int, dtype: torch.dtype, std: float = 1.0, **kinds: bool) -> dict[str, torch.Tensor]:
    given = rows(length, **kinds)
    given["q"], given["k"] = std * given["q"], std * given["k"]
    return {name: x.to(dtype) if name in "qkv" else x for name, x in given.items()}


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("causal", "length", "window", "kinds"),
    [
        (True, 130, 64, ()),
        (True, 200, 70, ("hidden", "runs", "decay")),
        (False, 129, 33, ("hidden", "runs", "decay")),
    ],
)
def test_half_precision_window_equals_float64_within_half_a_percent(dtype, std, causal, length, window, kinds):
    given = _half(length, dtype, std, **dict.fromkeys(kinds, True))
    options = {"window": window, "causal": causal}
    expected = results(lambda **x: window_attention(**x, **options), double(given))
    found = results(lambda **x: window_attention(**x, **options, backend="triton"), poison_hidden(given))
    assert found["out"].dtype == found["lse"].dtype == torch.float32
    for name, x in expected.items():
        error = (found[name].double() - x).norm() / x.norm()
        assert error < 5e-3, f"{name}: {error:.1e}"
    assert all(found["d" + name].dtype == dtype for name in "qkv")


@pytest.mark.parametrize("dtype", OPERANDS)
def test_half_precision_causal_output_ignores_later_keys_to_the_last_bit(dtype):
    given = _half(150, dtype)
    later = {name: x.clone() for name, x in given.items()}
    later["k"][:, 70:] *= 100
    later["v"][:, 70:] = -7.0
    found = [window_attention(**x, window=50, causal=True, backend="triton") for x in (given, later)]
    for before, after in zip(*found, strict=True):
        assert torch.equal(before[:, :70], after[:, :70])
        assert not torch.equal(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tiling_computes_the_same(monkeypatch, capability, head_dim):
    monkeypatch.setattr(triton_launch, "ELSEWHERE", triton_launch.Chip(capability, 101_376))
    generator = torch.Generator().manual_seed(3)
    given = {n: torch.randn(1, 140, head_dim, generator=generator).bfloat16().to(DEVICE) for n in "qkv"}
    options = {"window": 90, "causal": True}
    expected = results(lambda **x: window_attention(**x, **options), double(given))
    found = results(lambda **x: window_attention(**x, **options, backend="triton"), given)
    for name, x in expected.items():
        error = (found[name].double() - x).norm() / x.norm()
        assert error < 5e-3, f"{name}: {error:.1e}"
