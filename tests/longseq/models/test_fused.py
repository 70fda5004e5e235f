"""What a block fuses for a GPU against float64; its kernels are interpreted where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.longseq.attention.own_kernels import DEVICE
from torch import Tensor, nn

from longseq.attention import fused, rotary_table
from longseq.attention.heads import lay_out, split_heads
from longseq.models.norm import Norm
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

pytest.importorskip("triton")

from longseq.attention.backends.triton import launch as triton_launch

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not triton_launch.INTERPRETED, reason="no GPU, and triton was imported uninterpreted"
    ),
]
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
ROUNDING = {F32: 2e-6, BF16: 4e-3}  # relative, of the result's dtype


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Taken on a CPU too; memory that they should write holds NaN before."""
    monkeypatch.setattr(fused, "ELSEWHERE", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.to(DEVICE, dtype).requires_grad_()


def _off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.isfinite().all()
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("heads", "head_dim", "length"), [(3, 24, 70), (1, 2, 1), (2, 64, 33)])
@pytest.mark.parametrize("positions", ["none", "shared", "own", "tile"])
@pytest.mark.parametrize("normalised", [False, True])
def test_heads_are_split_normalised_and_turned_as_in_float64(dtype, heads, head_dim, length, positions, normalised):
    qkv = _random(2, length, 3 * heads * head_dim, dtype=dtype)
    at = torch.arange(length, device=DEVICE) + 5
    if positions == "own":
        at = torch.stack((at, at.flip(0)))
    table = None if positions == "none" else rotary_table(at, head_dim)
    if positions == "own":
        table = table.unsqueeze(2)
    elif positions == "tile":  # a part of a longer table, as tiles of a sequence have it
        table = rotary_table(torch.arange(length + 9, device=DEVICE), head_dim)[:, 5 : 5 + length]
    grads = [_random(2, heads, length, head_dim, dtype=dtype, seed=i).detach() for i in range(3)]
    temperature = _random(heads, 1, 1, dtype=dtype) if normalised else None
    found = split_heads(qkv, heads, table, temperature)
    assert all(x.is_contiguous() and x.dtype == dtype for x in found)
    torch.autograd.backward(found, grads)

    exact = qkv.detach().double().requires_grad_()
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in exact.chunk(3, -1))
    if temperature is not None:
        sharp = temperature.detach().double().requires_grad_()
        q, k = (nn.functional.normalize(x, dim=-1) * torch.exp(sharp / 2) * head_dim**0.25 for x in (q, k))
    if table is not None:
        cos, sin = table.double()
        q, k = (torch.cat((a * cos - b * sin, a * sin + b * cos), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
    torch.autograd.backward((q, k, v), [x.double() for x in grads])
    assert max(map(_off, found, (q, k, v))) < ROUNDING[dtype]
    # What is normalised is known as it was rounded, and in two dimensions its gradient nearly vanishes.
    assert _off(qkv.grad, exact.grad) < (3 * ROUNDING[dtype] if normalised else ROUNDING[dtype])
    if temperature is not None:
        # A sum over all positions, whose terms cancel.
        error = float((temperature.grad.double() - sharp.grad).abs().max())
        terms = sum(float((x.detach() * g.double()).abs().sum()) for x, g in zip((q, k), grads, strict=False))
        assert error < 3 * ROUNDING[dtype] * terms


def test_more_heads_than_a_grid_has_programs_are_split_by_pytorch():
    qkv = _random(fused.MOST_ROWS // 3 + 1, 1, 18)
    found = split_heads(qkv, 3)
    expected = qkv.unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4)
    assert all(map(torch.equal, found, expected))
    assert "_Heads" not in type(found[0].grad_fn).__name__
    assert "_Heads" in type(split_heads(qkv[:5], 3)[0].grad_fn).__name__


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 12, 4), (2, 9, 8), (2, 9, 2), (2, 3, 1, 9, 4), (2, 2, 1, 8, 4)])
def test_angles_that_do_not_match_are_refused(shape):
    with pytest.raises(RuntimeError, match=r"must match the size"):
        split_heads(_random(2, 9, 48), 2, torch.ones(shape, device=DEVICE))


def test_angles_of_each_head_turn_as_those_of_all():
    qkv = _random(2, 9, 48)
    table = rotary_table(torch.arange(18, device=DEVICE).view(2, 9), 8)
    found = split_heads(qkv, 2, table)
    for head in range(2):
        expected = split_heads(qkv, 2, table[:, head])
        assert all(_off(x[:, head], y[:, head].detach().double()) < 1e-6 for x, y in zip(found, expected, strict=True))


def test_a_norm_refuses_another_width_and_adds_rows_to_all():
    norm = Norm(24, 1e-5).to(DEVICE)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(_random(2, 9, 16))
    x, row = _random(2, 9, 24), _random(24)
    total, normed = norm(x, row)
    assert torch.equal(total, x + row)
    assert _off(normed, nn.functional.layer_norm((x + row).double(), (24,))) < 1e-6


@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16), (F32, None), (BF16, None)])
@pytest.mark.parametrize(("rows", "width"), [(70, 24), (1, 3), (300, 130)])
@pytest.mark.parametrize("uses", ["both", "norm", "sum"])
def test_sum_and_norm_are_those_of_float64(monkeypatch, x_dtype, y_dtype, rows, width, uses):
    from longseq.models import triton_norm

    monkeypatch.setattr(triton_norm, "PROGRAMS", 3)  # each goes through several blocks of rows
    norm = Norm(width, 1e-5).to(DEVICE, torch.promote_types(x_dtype, y_dtype or x_dtype))
    with torch.no_grad():
        norm.weight.copy_(_random(width) + 1)
        norm.bias.copy_(_random(width, seed=1))
    x = _random(2, rows, width, dtype=x_dtype, seed=2)
    y = None if y_dtype is None else _random(2, rows, width, dtype=y_dtype, seed=3)
    total, normed = norm(x, y, sums=True)
    g_total, g_normed = (
        _random(2, rows, width, dtype=out.dtype, seed=i).detach() for i, out in enumerate((total, normed))
    )
    outputs = {"both": (total, normed), "norm": (normed,), "sum": (total,)}[uses]
    torch.autograd.backward(outputs, {"both": (g_total, g_normed), "norm": (g_normed,), "sum": (g_total,)}[uses])

    given = [None if t is None else t.detach().double().requires_grad_() for t in (x, y, norm.weight, norm.bias)]
    a, b, weight, bias = given
    summed = a if b is None else a + b
    # The norm is that of the sum as it was rounded.
    rounded = summed + (total.detach().double() - summed.detach())
    expected = nn.functional.layer_norm(rounded, (width,), weight, bias, 1e-5)
    outputs = {"both": (summed, expected), "norm": (expected,), "sum": (summed,)}[uses]
    grads = {"both": (g_total, g_normed), "norm": (g_normed,), "sum": (g_total,)}[uses]
    torch.autograd.backward(outputs, [g.double() for g in grads])
    allowed = 5 * ROUNDING[F32] if total.dtype == F32 else ROUNDING[BF16]
    assert _off(total, summed) <= allowed
    assert _off(normed, expected) <= allowed
    for found, exact in zip((x, y, norm.weight, norm.bias), given, strict=True):
        if found is None or (uses == "sum" and found.ndim == 1):
            continue
        narrow = found.dtype == BF16 or total.dtype == BF16
        assert _off(found.grad, exact.grad) <= (ROUNDING[BF16] if narrow else 20 * ROUNDING[F32])


def test_norm_under_autocast_gives_what_linear_maps_read():
    norm = Norm(24, 1e-5).to(DEVICE)
    x = _random(2, 9, 24)
    with torch.autocast(DEVICE, BF16):
        total, normed = norm(x, _random(2, 9, 24, dtype=BF16))
    assert (total.dtype, normed.dtype) == (F32, BF16)


def test_a_second_derivative_is_refused():
    norm = Norm(24, 1e-5).to(DEVICE)
    x = _random(2, 9, 24)
    (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.sum().backward()


WAYS = {
    "plain": {},
    "checkpoints": {"activation_checkpointing": True},
    "tile": {"sequence_tile": 32, "carry": False},
    "carry": {"sequence_tile": 32},
    "post": {"norm": "post"},
    "learned": {"position": "learned", "max_positions": 80},
    "qk_norm": {"qk_norm": True},
    "values": {"value_residual": True},
}


@pytest.mark.parametrize(
    ("way", "precision"),
    [
        *((way, "fp32") for way in WAYS),
        *((way, "mixed") for way in ("plain", "checkpoints", "carry")),
        ("plain", "bf16"),
    ],
)
def test_a_model_learns_the_same_with_and_without_fused_kernels(monkeypatch, way, precision):
    spec = PerformerSpec(
        vocabulary=11, dim=24, depth=2, heads=2, ffn_dim=40, causal=True, features=32, window=8, learned_share=True,
        **WAYS[way],
    )  # fmt: skip
    torch.manual_seed(0)
    model = PerformerLM(spec).to(DEVICE).train()
    if precision == "bf16":
        model.to(BF16)
    tokens = torch.randint(11, (2, 77), device=DEVICE)

    def results(kernels: bool, model: PerformerLM) -> Tensor:
        """The loss, and all gradients."""
        monkeypatch.setattr(fused, "ELSEWHERE", kernels)
        monkeypatch.setattr(fused, "_runs_on", lambda gpu: kernels)
        model.zero_grad()
        with torch.autocast(DEVICE, BF16, enabled=precision == "mixed"):
            loss, _ = model(tokens, targets=tokens)
        loss.backward()
        kept = next(model.parameters()).dtype
        assert all(p.grad.dtype == kept for p in model.parameters())
        return torch.cat([loss.detach().double()[None], *(p.grad.double().flatten() for p in model.parameters())])

    found, plain = results(True, model), results(False, model)
    if precision == "fp32":
        assert _off(found, plain) < 1e-5
    else:
        precision = "exact"
        exact = results(False, model.float())
        error = _off(plain, exact)
        assert 1e-4 < error < 0.05
        assert _off(found, exact) < 1.25 * error


def test_a_rounded_result_lies_as_the_next_map_reads_it():
    out = _random(6, 10, 4)
    laid = lay_out(out, 2, 3, BF16)
    assert laid.shape == (2, 3, 10, 4)
    assert lay_out(out[:0], 0, 3, BF16).shape == (0, 3, 10, 4)
    assert laid.transpose(1, 2).is_contiguous()
    assert torch.equal(laid, out.view(2, 3, 10, 4).to(BF16))
    grad = _random(2, 3, 10, 4, dtype=BF16, seed=1).detach()
    laid.backward(grad)
    assert torch.equal(out.grad, grad.float().flatten(0, 1))
    assert lay_out(out, 2, 3, F32).data_ptr() == out.data_ptr()
