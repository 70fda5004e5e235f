"""Inputs and the float64 oracle that the tests of attention share."""

from __future__ import annotations

import torch
from torch import Tensor

from longseq.attention import favor_attention, projection_matrix
from longseq.attention.reference import quadratic_attention

BATCH, HEADS, HEAD_DIM, VALUE_DIM, FEATURES = 2, 3, 16, 9, 40

POSITIVE = ("softmax", "hyperbolic", "oprf", "smreg", "relu", "relu_direct", "sigmoid", "exp", "abs", "elu")
SIGNED = ("trigonometric", "gelu", "cos", "tanh", "identity")


def inputs(length: int, std: float = 1.0, dtype: torch.dtype = torch.float32, common: float = 0.0) -> list[Tensor]:
    """q, k, v that require gradients; ``common`` is added to every q and k, which keeps signed sums from cancelling."""
    rng = torch.Generator().manual_seed(length)
    q, k = (common + std * torch.randn(BATCH, HEADS, length, HEAD_DIM, generator=rng, dtype=dtype) for _ in range(2))
    v = torch.randn(BATCH, HEADS, length, VALUE_DIM, generator=rng, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v)]


def reference(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "softmax", **options) -> Tensor:
    """The oracle with the projections that favor_attention draws by default."""
    omega = None
    if kernel != "relu_direct":
        paired = kernel in ("hyperbolic", "trigonometric")
        omega = projection_matrix(
            FEATURES // 2 if paired else FEATURES,
            q.shape[-1],
            rows="sqrt_d" if kernel == "smreg" else "chi",
            dtype=torch.float64,
        )
    return quadratic_attention(q, k, v, omega, kernel=kernel, **options)


def assert_equals_reference(q: Tensor, k: Tensor, v: Tensor, tolerance: float = 1e-5, **options) -> None:
    """Output and every gradient, of what is learned too, equal the oracle's relative to the largest entry."""
    learned = {name: options.pop(name) for name in ("far_share", "decay", "gate") if options.get(name) is not None}
    ours = [t.detach().clone().requires_grad_() for t in (q, k, v, *learned.values())]
    exact = [t.detach().double().requires_grad_() for t in ours]
    out = favor_attention(*ours[:3], features=FEATURES, **options, **dict(zip(learned, ours[3:], strict=False)))
    expected = reference(*exact[:3], **options, **dict(zip(learned, exact[3:], strict=False)))
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = torch.autograd.grad(out, ours, direction, materialize_grads=True)
    wanted = torch.autograd.grad(expected, exact, direction.double(), materialize_grads=True)
    for name, g, w in zip(("q", "k", "v", *learned), got, wanted, strict=True):
        error = (g - w).abs().max() / w.abs().max().clamp_min(0.1)
        assert error < 10 * tolerance if name in learned else error < tolerance, f"d{name}: {error:.1e}"
