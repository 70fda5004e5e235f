"""The Triton kernels against the PyTorch operations in float64: on a GPU where there is one, else interpreted.

All memory that a kernel should write holds NaN before.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.longseq.attention import cases
from tests.longseq.attention.own_kernels import (
    BIDIRECTIONALS,
    DEVICE,
    HEAD_DIM,
    SCANS,
    VALUE_DIM,
    WINDOWS,
    assert_same,
    bidirectional_attention,
    double,
    maps,
    poison_hidden,
    results,
    rows,
    scan,
    window_attention,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longseq.attention import favor_attention
from longseq.attention.backends import choice as backends
from longseq.attention.feature_maps import feature_map
from longseq.attention.gates import running
from longseq.attention.operations import carried_scan
from longseq.attention.scan import Rows

pytest.importorskip("triton")

from longseq.attention.backends.triton import launch as triton_launch
from longseq.attention.backends.triton import scan as triton_backend
from longseq.attention.backends.triton import window as triton_window

# The interpreter computes both sides of every tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_launch.INTERPRETED, reason="no GPU, and triton was imported uninterpreted"
)


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # of the PyTorch versions, not all are on a GPU
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpreted_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for every operation on a tile, of whatever size."""
    monkeypatch.setattr(triton_backend, "PROGRAMS", 5)  # segments of several chunks
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_window, "STEP_FP32", 64)


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "length", "delay", "kinds"),
    SCANS,
)
def test_scan_and_its_gradients_equal_the_float64_scan(kernel, length, delay, kinds):
    phi, exact_phi = maps(kernel)
    given = rows(length, **dict.fromkeys(kinds, True))
    expected = results(lambda q, k, v, **x: scan(q, k, v, exact_phi, delay=delay, **x), double(given))
    found = results(lambda q, k, v, **x: scan(q, k, v, phi, delay=delay, **x, backend="triton"), poison_hidden(given))
    assert_same(found, expected)


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "queries", "length", "kinds"),
    BIDIRECTIONALS,
)
def test_bidirectional_and_its_gradients_equal_those_in_float64(kernel, queries, length, kinds):
    phi, exact_phi = maps(kernel)
    given = rows(length, **dict.fromkeys(kinds, True))
    given["q"] = rows(queries)["q"]

    def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        return bidirectional_attention(q, k, v, exact_phi, hidden)

    def ours(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        return bidirectional_attention(q, k, v, phi, hidden, backend="triton")

    assert_same(results(ours, poison_hidden(given)), results(plain, double(given)))


@needs_kernels
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
@pytest.mark.parametrize(
    ("length", "window", "kinds"),
    WINDOWS,
)
def test_window_and_its_gradients_equal_the_float64_window(causal, length, window, kinds):
    given = rows(length, **dict.fromkeys(kinds, True))
    options = {"window": window, "causal": causal}
    expected = results(lambda **x: window_attention(**x, **options), double(given))
    found = results(lambda **x: window_attention(**x, **options, backend="triton"), poison_hidden(given))
    assert_same(found, expected)


@needs_kernels
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
@pytest.mark.parametrize("window", [0, pytest.param(20, marks=pytest.mark.interfaces)])
def test_the_door_with_every_option_equals_the_quadratic_reference(causal, window):
    q, k, v = (t.detach() for t in cases.inputs(70))
    options: dict[str, object] = {
        "causal": causal,
        "window": window,
        "key_padding": torch.rand(cases.BATCH, 70, generator=torch.Generator().manual_seed(0)) > 0.2,
        "segments": torch.arange(70).expand(cases.BATCH, -1) // 30,
        "decay": torch.tensor([0.0, 0.01, 0.1]),
    }
    if window:
        options["far_share"] = torch.tensor([-1.0, 0.0, 0.5])
    expected = cases.reference(q, k, v, **options)
    on_device = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
    out = favor_attention(
        *(t.to(DEVICE) for t in (q, k, v)), features=cases.FEATURES, backend="triton", **on_device
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("way", [{"causal": True}, {"window": 7}], ids=["causal", "window on both sides"])
def test_forget_gates_through_the_door_equal_the_quadratic_reference(monkeypatch, way):
    gate = -torch.rand(cases.BATCH, cases.HEADS, 150, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(cases, "favor_attention", functools.partial(favor_attention, backend="triton"))
    cases.assert_equals_reference(*cases.inputs(150, std=0.5), 2e-5, gate=gate, **way)


@needs_kernels
@pytest.mark.parametrize("reach", [0, 70])
def test_a_gate_has_its_gradient_through_a_state_before_and_one_behind(reach):
    """Tiles: what a scan leaves and what it begins with, and both gradients, as in float64."""
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        phi = feature_map("softmax", 16, HEAD_DIM, dtype=dtype, device=DEVICE)
        q, k, v = (x.to(dtype).requires_grad_() for x in rows(150).values())
        log_f = rows(150, gate=True)["gate"].diff(dim=1)[..., 0].to(dtype).requires_grad_()
        outputs, state = [], None
        for part in (slice(0, 80), slice(80, 150)):
            tile = Rows(q[:, part], k[:, part], v[:, part], phi=phi, gate=running(log_f[:, part]))
            out, _, state = carried_scan(replace(tile, delay=reach), state, backend)
            outputs.append(out)
        whole = torch.cat([*outputs, state.sums.flatten(1)[..., None].expand(-1, -1, VALUE_DIM)], 1)
        direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2)).to(whole)
        found.append([whole.detach(), *torch.autograd.grad(whole, [q, k, v, log_f], direction)])
    for exact, ours in zip(*found, strict=True):
        assert (ours.double() - exact).norm() < 1e-5 * exact.norm()


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "position"),
    [
        ("relu", 1),
        ("softmax", 64),
        ("relu", 100),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [("softmax", 1), ("relu", 64), ("softmax", 100)]),
    ],
)
def test_causal_output_ignores_later_keys_to_the_last_bit(kernel, position):
    phi, _ = maps(kernel)
    given = rows(129)
    later = {n: x.clone() for n, x in given.items()}
    later["k"][:, position:] *= 1e3
    later["v"][:, position:] = -7.0
    for operation in (
        lambda q, k, v: scan(q, k, v, phi, backend="triton"),
        lambda q, k, v: window_attention(q, k, v, window=50, causal=True, backend="triton"),
    ):
        for before, after in zip(operation(**given), operation(**later), strict=True):
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position:], after[:, position:])


@needs_kernels
def test_the_same_call_gives_the_same_bits_whatever_is_in_memory_at_a_time(monkeypatch):
    phi, _ = maps("softmax")
    given = rows(100, runs=True)

    def ours(q: Tensor, k: Tensor, v: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
        return scan(q, k, v, phi, runs=runs, backend="triton")

    at_once = results(ours, given)
    monkeypatch.setattr(triton_backend, "STATE_BYTES", 1)
    in_turn = results(ours, given)
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)


@needs_kernels
@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_inputs_of_any_magnitude_give_finite_outputs_and_gradients(magnitude):
    phi, _ = maps("softmax")
    given = rows(70)
    given["q"], given["k"] = magnitude * given["q"], magnitude * given["k"]
    found = results(lambda q, k, v: scan(q, k, v, phi, backend="triton"), given)
    assert all(x.isfinite().all() for x in found.values())
    assert found["out"].abs().max() <= given["v"].abs().max() * 1.001


@needs_kernels
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nan_in_the_inputs_is_not_hidden(name):
    phi, _ = maps("relu")
    given = rows(70)
    given[name][:, 30] = torch.nan
    assert scan(**given, phi=phi, backend="triton")[0][:, 30].isnan().all()
    assert bidirectional_attention(**given, phi=phi, backend="triton")[:, 30].isnan().all()


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor) and x.is_floating_point():  # the interpreter copies bytes
                self.numel = max(self.numel, x.numel())
        return made


@needs_kernels
def test_no_features_in_memory():
    length = features = 128
    phi = feature_map("softmax", features, 16, device=DEVICE)
    q, k, v = (torch.randn(1, length, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    with _Largest() as largest:
        out, lse = scan(q, k, v, phi, backend="triton")
        (out.sum() + lse.sum()).backward()
        bidirectional_attention(q, k, v, phi, None, backend="triton").sum().backward()
    # The largest are the states: m · (e + 1) a segment. Features would be m a row.
    assert largest.numel <= length * features / 3


def test_auto_is_triton_on_a_gpu_and_nowhere_else():
    phi = feature_map("softmax", 16, 8)
    assert not isinstance(backends.choose("auto", phi, (torch.zeros(1, 4, 8),) * 3), backends.Triton)
    if DEVICE == "cuda":
        on_gpu = (torch.zeros(1, 4, 8, device=DEVICE),) * 3
        assert isinstance(backends.choose("auto", phi, on_gpu), backends.Triton)
        assert isinstance(backends.choose("auto", feature_map("cos", 16, 8), on_gpu), backends.Torch)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernel": "cos"}, "only softmax, .* are written in Triton"),
        ({"kernel": "exp"}, "only softmax, .* are written in Triton"),
        ({"dtype": torch.float64}, "take torch.float32, bfloat16 and float16, and the inputs are torch.float64"),
        ({"head_dim": 200}, "head_dim and value_dim may be up to 128, and one is 200"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_a_way_out(change, sentence):
    asked = {"kernel": "softmax", "dtype": torch.float32, "head_dim": 8, **change}
    q = torch.zeros(1, 1, 4, asked["head_dim"], dtype=asked["dtype"], device=DEVICE)
    with pytest.raises(ValueError, match=f'{sentence}.*backend="torch" can'):
        favor_attention(q, q, q, kernel=asked["kernel"], backend="triton")


def _python(program: str) -> str:
    """What a fresh interpreter of Python prints that may not interpret kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_imported_only_when_asked_for_and_refuses_a_cpu():
    printed = _python("""
import sys, torch
from longseq.attention import favor_attention
q = torch.zeros(1, 1, 4, 8)
favor_attention(q, q, q)
print("triton" in sys.modules)
try:
    favor_attention(q, q, q, backend="triton")
except ValueError as error:
    print(error)
""")
    assert printed.startswith("False\n")
    assert "run on NVIDIA GPUs, and the tensors are on cpu" in printed
    assert 'backend="torch" can' in printed


@needs_kernels
@pytest.mark.parametrize(
    ("capability", "shared", "head_dim", "dtype", "takes"),
    [
        ((8, 6), 101_376, 128, torch.bfloat16, True),
        ((8, 6), 101_376, 128, torch.float32, True),
        ((8, 0), 166_912, 128, torch.float32, True),
        ((10, 0), 232_448, 128, torch.float32, True),
        ((8, 0), 65_536, 64, torch.float32, False),
        ((8, 0), 65_536, 128, torch.float32, False),
    ],
)
def test_a_chip_is_asked_for_the_memory_of_both_passes(monkeypatch, capability, shared, head_dim, dtype, takes):
    monkeypatch.setattr(triton_launch, "chip", lambda device: triton_launch.Chip(capability, shared))
    rows_of = (torch.zeros(1, 4, head_dim, device=DEVICE, dtype=dtype),) * 3
    reason = triton_launch.unsupported(feature_map("softmax", 16, head_dim, device=DEVICE), rows_of)
    assert (reason is None) == takes
    if not takes:
        needed = "81,920" if head_dim == 64 else "90,112"
        chip = "sm_{}{} has {:,}".format(*capability, shared)
        assert (
            f"head_dim {head_dim} in torch.float32 needs {needed} bytes of shared memory a block, and {chip}" in reason
        )
