"""The C++ kernels against the PyTorch operations in float64. All memory that a kernel should write holds NaN before."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.longseq.attention import cases
from tests.longseq.attention.own_kernels import (
    BIDIRECTIONALS,
    SCANS,
    WINDOWS,
    assert_same,
    bidirectional_attention,
    double,
    maps,
    poison_hidden,
    results,
    scan,
    window_attention,
)
from tests.longseq.attention.own_kernels import rows as rows_on
from torch import Tensor

from longseq.attention import favor_attention
from longseq.attention.backends import choice as backends
from longseq.attention.backends.native import build
from longseq.attention.feature_maps import feature_map

needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason=f"no native kernels: {build.unavailable()}")


def rows(length: int, **kinds: bool) -> dict[str, Tensor]:
    return rows_on(length, device="cpu", **kinds)


@needs_compiler
@pytest.mark.parametrize(("kernel", "length", "delay", "kinds"), SCANS)
def test_scan_and_its_gradients_equal_the_float64_scan(kernel, length, delay, kinds):
    phi, exact_phi = maps(kernel, device="cpu")
    given = rows(length, **dict.fromkeys(kinds, True))
    expected = results(lambda q, k, v, **x: scan(q, k, v, exact_phi, delay=delay, **x), double(given))
    found = results(lambda q, k, v, **x: scan(q, k, v, phi, delay=delay, **x, backend="native"), poison_hidden(given))
    assert_same(found, expected)


@needs_compiler
@pytest.mark.parametrize(("kernel", "queries", "length", "kinds"), BIDIRECTIONALS)
def test_bidirectional_and_its_gradients_equal_those_in_float64(kernel, queries, length, kinds):
    phi, exact_phi = maps(kernel, device="cpu")
    given = rows(length, **dict.fromkeys(kinds, True))
    given["q"] = rows(queries)["q"]

    def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        return bidirectional_attention(q, k, v, exact_phi, hidden)

    def ours(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        return bidirectional_attention(q, k, v, phi, hidden, backend="native")

    assert_same(results(ours, poison_hidden(given)), results(plain, double(given)))


@needs_compiler
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
@pytest.mark.parametrize(("length", "width", "kinds"), WINDOWS)
def test_window_and_its_gradients_equal_the_float64_window(causal, length, width, kinds):
    given = rows(length, **dict.fromkeys(kinds, True))
    options = {"window": width, "causal": causal}
    expected = results(lambda **x: window_attention(**x, **options), double(given))
    found = results(lambda **x: window_attention(**x, **options, backend="native"), poison_hidden(given))
    assert_same(found, expected)


@needs_compiler
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
@pytest.mark.parametrize("width", [0, 20])
def test_the_door_with_every_option_equals_the_quadratic_reference(causal, width):
    q, k, v = (t.detach() for t in cases.inputs(70))
    options: dict[str, object] = {
        "causal": causal,
        "window": width,
        "key_padding": torch.rand(cases.BATCH, 70, generator=torch.Generator().manual_seed(0)) > 0.2,
        "segments": torch.arange(70).expand(cases.BATCH, -1) // 30,
        "decay": torch.tensor([0.0, 0.01, 0.1]),
    }
    if width:
        options["far_share"] = torch.tensor([-1.0, 0.0, 0.5])
    expected = cases.reference(q, k, v, **options)
    out = favor_attention(q, k, v, features=cases.FEATURES, backend="native", **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("position", [1, 64, 100])
def test_causal_output_ignores_later_keys_to_the_last_bit(kernel, position):
    phi, _ = maps(kernel, device="cpu")
    given = rows(129)
    later = {n: x.clone() for n, x in given.items()}
    later["k"][:, position:] *= 1e3
    later["v"][:, position:] = -7.0
    for operation in (
        lambda q, k, v: scan(q, k, v, phi, backend="native"),
        lambda q, k, v: window_attention(q, k, v, window=50, causal=True, backend="native"),
    ):
        for before, after in zip(operation(**given), operation(**later), strict=True):
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position:], after[:, position:])


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "scan": lambda q, k, v, phi: scan(q, k, v, phi, backend="native")[0],
    "bidirectional": lambda q, k, v, phi: bidirectional_attention(q, k, v, phi, None, backend="native"),
    "window": lambda q, k, v, phi: window_attention(q, k, v, window=9, causal=True, backend="native")[0],
}


@needs_compiler
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_number_of_threads_changes_no_bit(operation):
    phi, _ = maps("softmax", device="cpu")
    given = {name: torch.cat([x, x.flip(1), -x]) for name, x in rows(200).items()}
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(results(lambda q, k, v: OPERATIONS[operation](q, k, v, phi), given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@needs_compiler
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_inputs_of_any_magnitude_give_finite_outputs_and_gradients(operation, magnitude):
    phi, _ = maps("softmax", device="cpu")
    given = rows(70)
    given["q"], given["k"] = magnitude * given["q"], magnitude * given["k"]
    found = results(lambda q, k, v: OPERATIONS[operation](q, k, v, phi), given)
    assert all(x.isfinite().all() for x in found.values())
    assert found["out"].abs().max() <= given["v"].abs().max() * 1.001


@needs_compiler
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nan_in_the_inputs_is_not_hidden(operation, kernel, name):
    phi, _ = maps(kernel, device="cpu")
    given = rows(70)
    given[name][:, 30] = torch.nan
    assert OPERATIONS[operation](**given, phi=phi)[:, 30].isnan().all()


@needs_compiler
def test_training_keeps_a_state_for_every_other_chunk_and_no_features():
    length, features, dim = 4096, 256, 64
    phi = feature_map("softmax", features, dim)
    q, k, v = (torch.randn(1, length, dim, requires_grad=True) for _ in range(3))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(q, k, v, phi, backend="native")
    given = q, k, v, phi.weight
    mine = sum(x.numel() * 4 for x in saved if all(x is not y for y in given)) - 4 * length * dim  # without out
    assert mine / length < 530  # bytes a token: 520 of states, 4 of the denominator; the features would be 2,048


def test_auto_is_native_for_what_the_kernels_can_on_a_cpu():
    def choice(kernel: str, dtype: torch.dtype = torch.float32) -> backends.Backend:
        return backends.choose("auto", feature_map(kernel, 16, 8, dtype=dtype), (torch.zeros(1, 4, 8, dtype=dtype),))

    expected = backends.Torch if build.unavailable() else backends.Native
    assert isinstance(choice("softmax"), expected)
    assert isinstance(choice("relu"), expected)
    assert isinstance(choice("cos"), backends.Torch)
    assert isinstance(choice("softmax", torch.float64), backends.Torch)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernel": "cos"}, "only softmax, .* are written in C"),
        ({"dtype": torch.float64}, "compute in torch.float32, and the inputs are torch.float64"),
        ({"device": "meta"}, "run on CPUs, and the tensors are on meta"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_a_way_out(change, sentence):
    asked = {"kernel": "softmax", "dtype": torch.float32, "device": "cpu", **change}
    phi = feature_map(asked["kernel"], 16, 8)
    q = torch.zeros(1, 4, 8, dtype=asked["dtype"], device=asked["device"])
    with pytest.raises(ValueError, match=f'{sentence}.*backend="torch" can'):
        backends.choose("native", phi, (q, q, q))


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize(
    "instructions",
    [
        pytest.param(["-march=x86-64"], id="SSE2"),
        pytest.param(["-march=x86-64-v3"], id="AVX2", marks=pytest.mark.long),  # about what this machine has
    ],
)
def test_kernels_for_other_processors_give_the_same(instructions, tmp_path, monkeypatch):
    if "v3" in instructions[0] and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    target = tmp_path / "kernels.so"
    build._compile(build._compiler(), (*build._flags(), *instructions), target)
    compiled = ctypes.CDLL(str(target))
    monkeypatch.setattr(build, "library", lambda: compiled)
    phi, exact_phi = maps("softmax", device="cpu")
    given = rows(301, hidden=True, runs=True, decay=True)
    found = results(lambda q, k, v, **x: scan(q, k, v, phi, delay=37, **x, backend="native"), given)
    assert_same(found, results(lambda q, k, v, **x: scan(q, k, v, exact_phi, delay=37, **x), double(given)))
    found = results(lambda **x: window_attention(**x, window=65, causal=False, backend="native"), given)
    assert_same(found, results(lambda **x: window_attention(**x, window=65, causal=False), double(given)))
