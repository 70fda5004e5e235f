"""The Triton kernels of scans on bf16 and fp16, against float64 with the same rounded projections."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.longseq.attention.own_kernels import DEVICE, assert_same, double, poison_hidden, results
from torch import Tensor

from longseq.attention.bidirectional_operator import bidirectional_attention
from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.attention.scan_operator import scan

pytest.importorskip("triton")

from longseq.attention import triton_backend, triton_launch

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes both sides of every tl.where
    pytest.mark.skipif(
        DEVICE == "cpu" and not triton_launch.INTERPRETED, reason="no GPU, and triton was imported uninterpreted"
    ),
]
HALF_PRECISION = 5e-3  # outputs are within 2.5e-3
# One number a head, a sum over all pairs whose terms nearly cancel; rounding errors of the state's terms do not.
DECAY = 4e-2


@pytest.fixture(autouse=True)
def segments_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "PROGRAMS", 3)


def maps(kernel: str, features: int, head_dim: int, dtype: torch.dtype) -> tuple[FeatureMap, FeatureMap]:
    """In fp32 and float64, both with projections rounded to ``dtype``."""
    single, exact = (
        feature_map(kernel, features, head_dim, dtype=kind, device=DEVICE) for kind in (torch.float32, torch.float64)
    )
    rounded = single.weight.to(dtype)  # type: ignore[attr-defined]
    return replace(single, weight=rounded.float()), replace(exact, weight=rounded.double())  # type: ignore[type-var]


def rows(
    length: int, head_dim: int, value_dim: int, std: float, dtype: torch.dtype, *kinds: str, queries: int | None = None
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, n, w, generator=rng) for n, w in
               ((queries or length, head_dim), (length, head_dim), (length, value_dim)))  # fmt: skip
    given = {
        "q": (std * q).to(dtype),
        "k": (std * k).to(dtype),
        "v": v.to(dtype),
        "hidden": torch.rand(2, length, generator=rng) < 0.3,
        "runs": (torch.rand(2, length, generator=rng) > 0.97).cumsum(1),
        "decay": torch.tensor([0.01, 0.1]).view(2, 1, 1),
    }
    return {name: x.to(DEVICE) for name, x in given.items() if name in ("q", "k", "v", *kinds)}


@pytest.mark.parametrize(
    ("kernel", "features", "head_dim", "value_dim", "length", "delay", "std", "dtype", "kinds"),
    [
        ("softmax", 128, 32, 32, 201, 0, 0.5, torch.bfloat16, ()),
        ("softmax", 64, 64, 64, 130, 0, 1.0, torch.bfloat16, ()),
        ("softmax", 256, 64, 64, 129, 0, 2.0, torch.bfloat16, ()),
        ("relu", 100, 24, 40, 150, 9, 1.0, torch.bfloat16, ("hidden",)),
        ("softmax", 100, 16, 24, 203, 37, 1.0, torch.bfloat16, ("hidden", "runs")),
        ("softmax", 64, 32, 16, 130, 0, 1.0, torch.float16, ()),
        ("softmax", 64, 64, 64, 321, 0, 1.0, torch.bfloat16, ("decay",)),
    ],
)
def test_half_precision_scan_and_its_gradients_are_near_float64(
    kernel, features, head_dim, value_dim, length, delay, std, dtype, kinds
):
    phi, exact = maps(kernel, features, head_dim, dtype)
    given = rows(length, head_dim, value_dim, std, dtype, *kinds)
    expected = results(lambda q, k, v, **x: scan(q, k, v, exact, delay=delay, **x), double(given))
    found = results(lambda q, k, v, **x: triton_backend.scan(q, k, v, phi, delay=delay, **x), poison_hidden(given))
    assert found["out"].dtype == found["lse"].dtype == torch.float32
    assert all(found["d" + name].dtype == dtype for name in "qkv")
    if "decay" in kinds:
        assert_same({"ddecay": found["ddecay"]}, {"ddecay": expected.pop("ddecay")}, DECAY)
    assert_same(found, expected, HALF_PRECISION)
    assert_same({"out": found["out"]}, {"out": expected["out"]}, HALF_PRECISION / 2)


def test_half_precision_bidirectional_and_its_gradients_are_near_float64():
    phi, exact = maps("softmax", 64, 32, torch.bfloat16)
    given = rows(130, 32, 24, 1.0, torch.bfloat16, "hidden", queries=70)
    expected = results(lambda q, k, v, hidden: bidirectional_attention(q, k, v, exact, hidden), double(given))

    def ours(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return triton_backend.bidirectional_attention(q, k, v, phi, hidden)

    assert_same(results(ours, poison_hidden(given)), expected, HALF_PRECISION)


@pytest.mark.parametrize("position", [1, 64, 100])
def test_causal_half_precision_output_ignores_later_keys_to_the_last_bit(position):
    phi, _ = maps("softmax", 64, 16, torch.bfloat16)
    given = rows(135, 16, 16, 1.0, torch.bfloat16)
    later = {name: x.clone() for name, x in given.items()}
    later["k"][:, position:] *= 100
    later["v"][:, position:] = -7.0
    for before, after in zip(
        triton_backend.scan(**given, feature_map=phi), triton_backend.scan(**later, feature_map=phi), strict=True
    ):
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize(
    ("sequences", "length"), [(8, 8192), (8, 2**20), (1, 2**20), (64, 4096), (2000, 100), (8, 8700)]
)
def test_there_are_segments_for_every_multiprocessor_and_no_more(monkeypatch, sequences, length):
    monkeypatch.undo()
    number, steps = triton_backend.segments(sequences, length)
    chunks = -(-length // triton_backend.CHUNK)
    assert (number - 1) * steps < chunks <= number * steps
    assert number <= triton_backend.SEGMENTS
    assert number * sequences >= min(528, chunks * sequences, triton_backend.SEGMENTS // 2)
