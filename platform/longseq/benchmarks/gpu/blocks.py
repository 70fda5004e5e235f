"""What a block fuses on a GPU, against PyTorch's operations in float64: heads and rotary positions, sums and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from longseq.attention import rotary_table
from longseq.attention.heads import split_heads
from longseq.benchmarks.gpu.kernels import poisoned_memory
from longseq.benchmarks.gpu.rows import Rows, first_line
from longseq.models.norm import Norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # of the norm of what is exact
Call = Callable[..., Sequence[Tensor]]


def check(rows: Rows, device: str, folder: Path) -> None:
    """The worst of outputs and gradients, of sizes drawn at random."""
    draw, most = Random(16), 5000 if device == "cuda" else 90
    for dtype, tolerance in TOLERANCE.items():
        heads, head_dim, length = draw.choice((1, 3, 8)), draw.choice((24, 64, 80, 128)), draw.randint(1, most)
        table = rotary_table(torch.arange(length, device=device), head_dim)
        what = f"{heads} heads of {head_dim}, rotated, L {length:,}, {dtype}"
        qkv = _random(dtype, device, 2, length, 3 * heads * head_dim)

        def split(x: Tensor, heads: int = heads, table: Tensor = table) -> Sequence[Tensor]:
            return split_heads(x, heads, table)

        def exactly(x: Tensor, heads: int = heads, table: Tensor = table) -> Sequence[Tensor]:
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(3, -1))
            cos, sin = table.double()
            turned = []
            for a, b in (q.chunk(2, -1), k.chunk(2, -1)):
                turned.append(torch.cat((a * cos - b * sin, a * sin + b * cos), -1))
            return *turned, v

        _compare(rows, what, tolerance, split, exactly, [qkv])
        for branch in (None, dtype, *([torch.bfloat16] if dtype == torch.float32 else [])):
            width, length = draw.choice((130, 512, 1024, 4096)), draw.randint(1, most)
            norm = Norm(width, 1e-5).to(device, dtype)
            x = [_random(dtype, device, 2, length, width)]
            x += [] if branch is None else [_random(branch, device, 2, length, width)]
            exact = Norm(width, 1e-5, backend="torch").to(device, torch.float64)
            what = f"norm of {length:,} rows of {width}, {dtype}{'' if branch is None else f' plus {branch}'}"
            _compare(
                rows,
                what,
                max(tolerance, TOLERANCE[branch or dtype]),
                lambda *x, norm=norm: norm(*x, sums=True),
                lambda *x, norm=exact: norm(*x, sums=True),
                x,
            )


def _compare(rows: Rows, what: str, tolerance: float, call: Call, exactly: Call, inputs: Sequence[Tensor]) -> None:
    ours, theirs = ([x.detach().to(of).requires_grad_() for x, of in zip(inputs, kinds, strict=True)]
                    for kinds in ([x.dtype for x in inputs], [torch.float64] * len(inputs)))  # fmt: skip
    try:
        with poisoned_memory():
            found = call(*ours)
            directions = [torch.randn_like(x) for x in found]
            torch.autograd.backward(found, directions)
    except Exception as error:  # the other cases are still worth their time
        rows.failed(what, first_line(error))
        return
    expected = exactly(*theirs)
    torch.autograd.backward(expected, [x.double() for x in directions])
    gradients, exact = ([x.grad for x in leaves if x.grad is not None] for leaves in (ours, theirs))
    pairs = zip((*found, *gradients), (*expected, *exact), strict=True)
    errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30)) for a, b in pairs]
    rows.add(what, max(errors) if all(e == e for e in errors) else torch.nan, most=tolerance)


def _random(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng).to(device, dtype)
