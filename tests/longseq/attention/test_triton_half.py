"""The Triton kernels of scans on bf16 and fp16, against float64 with the same rounded projections."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.longseq.attention.own_kernels import (
    DEVICE,
    assert_same,
    bidirectional_attention,
    double,
    poison_hidden,
    results,
    scan,
    window_attention,
)
from torch import Tensor

from longseq.attention import operations
from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.attention.gates import running
from longseq.attention.operations import carried_scan
from longseq.attention.parts import combine
from longseq.attention.scan import Rows

pytest.importorskip("triton")

from longseq.attention.backends.triton import launch as triton_launch
from longseq.attention.backends.triton import scan as triton_backend

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes both sides of every tl.where
    pytest.mark.skipif(
        DEVICE == "cpu" and not triton_launch.INTERPRETED, reason="no GPU, and triton was imported uninterpreted"
    ),
]
HALF_PRECISION = 5e-3
OUTPUT = 2.75e-3


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
    length: int, head_dim: int, value_dim: int, std: float, dtype: torch.dtype, *kinds: str, queries: int | None = None,
    number: int = 2,
) -> dict[str, Tensor]:  # fmt: skip
    rng = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(number, n, w, generator=rng) for n, w in
               ((queries or length, head_dim), (length, head_dim), (length, value_dim)))  # fmt: skip
    given = {
        "q": (std * q).to(dtype),
        "k": (std * k).to(dtype),
        "v": v.to(dtype),
        "hidden": torch.rand(number, length, generator=rng) < 0.3,
        "runs": (torch.rand(number, length, generator=rng) > 0.97).cumsum(1),
        "decay": torch.logspace(-2, -1, number).view(number, 1, 1),
    }
    return {name: x.to(DEVICE) for name, x in given.items() if name in ("q", "k", "v", *kinds)}


@pytest.mark.parametrize(
    ("kernel", "features", "head_dim", "value_dim", "length", "delay", "std", "dtype", "kinds"),
    [
        ("softmax", 128, 32, 32, 201, 0, 0.5, torch.bfloat16, ()),
        pytest.param("softmax", 64, 64, 64, 130, 0, 1.0, torch.bfloat16, (), marks=pytest.mark.long),
        ("softmax", 256, 64, 64, 129, 0, 2.0, torch.bfloat16, ()),
        ("relu", 100, 24, 40, 150, 9, 1.0, torch.bfloat16, ("hidden",)),
        ("softmax", 100, 16, 24, 203, 37, 1.0, torch.bfloat16, ("hidden", "runs")),
        ("softmax", 64, 32, 16, 130, 0, 1.0, torch.float16, ()),
        pytest.param("softmax", 64, 64, 64, 321, 64, 2.0, torch.bfloat16, (), marks=pytest.mark.long),
    ],
)
def test_half_precision_scan_and_its_gradients_are_near_float64(
    kernel, features, head_dim, value_dim, length, delay, std, dtype, kinds
):
    phi, exact = maps(kernel, features, head_dim, dtype)
    given = rows(length, head_dim, value_dim, std, dtype, *kinds)
    expected = results(lambda q, k, v, **x: scan(q, k, v, exact, delay=delay, **x), double(given))
    found = results(lambda q, k, v, **x: scan(q, k, v, phi, delay=delay, **x, backend="triton"), poison_hidden(given))
    assert found["out"].dtype == found["lse"].dtype == torch.float32
    assert all(found["d" + name].dtype == dtype for name in "qkv")
    assert_same(found, expected, HALF_PRECISION)
    assert_same({"out": found["out"]}, {"out": expected["out"]}, OUTPUT)


@pytest.mark.parametrize(
    ("kernel", "length", "delay", "std"),
    [
        pytest.param("softmax", 321, 0, 1.0, marks=pytest.mark.long),
        ("softmax", 201, 64, 2.0),
        pytest.param("relu", 201, 0, 1.0, marks=pytest.mark.long),
    ],
)
def test_half_precision_gradient_of_the_decay_is_near_float64(monkeypatch, kernel, length, delay, std):
    """Over several heads: a head's is a sum whose terms may happen to cancel."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", 8)  # two segments
    phi, exact = maps(kernel, 64, 32, torch.bfloat16)
    given = rows(length, 32, 32, std, torch.bfloat16, "decay", number=4)
    expected = results(lambda q, k, v, decay: scan(q, k, v, exact, delay=delay, decay=decay), double(given))
    found = results(lambda q, k, v, decay: scan(q, k, v, phi, delay=delay, decay=decay, backend="triton"), given)
    assert_same(found, expected, HALF_PRECISION)


@pytest.mark.parametrize("programs", [6, 24], ids=["segments of four chunks", "of one"])
def test_half_precision_gradients_of_a_slow_decay_over_many_segments_are_near_float64(monkeypatch, programs):
    """The state behind a segment is that of its last keys in few segments alone."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", programs)
    phi, exact = maps("softmax", 32, 16, torch.bfloat16)
    given = rows(760, 16, 16, 1.0, torch.bfloat16, "decay")
    given["decay"] /= 20
    expected = results(lambda q, k, v, decay: scan(q, k, v, exact, decay=decay), double(given))
    found = results(lambda q, k, v, decay: scan(q, k, v, phi, decay=decay, backend="triton"), given)
    assert_same(found, expected, HALF_PRECISION)


@pytest.mark.parametrize("window", [0, 70])
def test_half_precision_gradient_of_the_gate_is_near_float64(monkeypatch, window):
    """Of the log-gates, each a sum over all later positions: a pair's rounding error ends between its two."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", 9)
    phi, exact = maps("softmax", 64, 32, torch.bfloat16)
    given = rows(400, 32, 32, 1.0, torch.bfloat16)
    gates = F.logsigmoid(torch.randn(2, 400, generator=torch.Generator().manual_seed(3)) + 3).to(DEVICE)
    found = []
    for backend, of_map, inputs in (("torch", exact, double(given)), ("triton", phi, given)):
        log_f = gates.to(of_map.weight.dtype).requires_grad_()
        asked = Rows(*inputs.values(), phi=of_map, delay=window, gate=running(log_f))
        near = [operations.window_attention(asked, window, causal=True, backend=backend)] if window else []
        out = combine([*near, operations.scan(asked, backend)])[0]
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append(torch.autograd.grad(out, log_f, direction)[0].double())
    assert (found[1] - found[0]).norm() < HALF_PRECISION * found[0].norm()


def test_half_precision_with_the_tiles_of_an_a100_is_near_float64(monkeypatch):
    """Products come from registers there, and the state of the keys' gradients goes on last."""
    monkeypatch.setattr(triton_launch, "ELSEWHERE", triton_launch.Chip((8, 0), 166_912))
    monkeypatch.setattr(triton_backend, "PROGRAMS", 16)
    phi, exact = maps("softmax", 80, 32, torch.bfloat16)
    given = rows(195, 32, 24, 1.0, torch.bfloat16, "hidden", "runs", "decay", number=8)
    expected = results(lambda q, k, v, **x: scan(q, k, v, exact, delay=9, **x), double(given))
    found = results(lambda q, k, v, **x: scan(q, k, v, phi, delay=9, **x, backend="triton"), poison_hidden(given))
    assert_same(found, expected, HALF_PRECISION)


def tiles_with_a_window(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, phi: FeatureMap, backend: str
) -> tuple[Tensor, Tensor]:
    """As longseq.attention.carried does: two tiles, the second from the state behind the first."""
    window, tile = 32, 128
    state, found = None, []
    for start in range(0, q.shape[1], tile):
        halo = min(start, window)
        part, keys = slice(start, start + tile), slice(start - halo, start + tile)
        queries, near = F.pad(q[:, part], (0, 0, halo, 0)), {"window": window, "causal": True, "decay": decay}
        exact = window_attention(queries, k[:, keys], v[:, keys], **near, backend=backend)  # type: ignore[arg-type]
        rows_ = Rows(queries, k[:, keys], v[:, keys], decay, phi=phi, delay=window)
        out, lse, state = carried_scan(rows_, state, backend)
        found.append([x[:, halo:] for x in combine([exact, (out, lse)])])
    out, lse = (torch.cat(x, 1) for x in zip(*found, strict=True))
    return out, lse


def test_half_precision_gradient_of_the_decay_over_tiles_with_a_window_is_near_float64():
    phi, exact = maps("softmax", 64, 32, torch.bfloat16)
    given = rows(200, 32, 32, 1.0, torch.bfloat16, "decay", number=4)
    expected = results(lambda **x: tiles_with_a_window(**x, phi=exact, backend="torch"), double(given))
    assert_same(
        results(lambda **x: tiles_with_a_window(**x, phi=phi, backend="triton"), given), expected, HALF_PRECISION
    )


def test_half_precision_bidirectional_and_its_gradients_are_near_float64():
    phi, exact = maps("softmax", 64, 32, torch.bfloat16)
    given = rows(130, 32, 24, 2.0, torch.bfloat16, "hidden", queries=70)
    expected = results(lambda q, k, v, hidden: bidirectional_attention(q, k, v, exact, hidden), double(given))

    def ours(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return bidirectional_attention(q, k, v, phi, hidden, backend="triton")

    assert_same(results(ours, poison_hidden(given)), expected, HALF_PRECISION)


@pytest.mark.parametrize("position", [1, 64, 100])
def test_causal_half_precision_output_ignores_later_keys_to_the_last_bit(position):
    phi, _ = maps("softmax", 64, 16, torch.bfloat16)
    given = rows(135, 16, 16, 1.0, torch.bfloat16)
    later = {name: x.clone() for name, x in given.items()}
    later["k"][:, position:] *= 100
    later["v"][:, position:] = -7.0
    for before, after in zip(
        scan(**given, phi=phi, backend="triton"), scan(**later, phi=phi, backend="triton"), strict=True
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
