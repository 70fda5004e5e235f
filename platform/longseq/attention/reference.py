"""The obvious quadratic attention, every kernel and option from its definition, in float64: the oracle of the tests.

Never used in training: it holds the whole L × L matrix, and for the exponential kernels L × L × m exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-3
_GENERALISED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "abs": torch.abs,
    "gelu": F.gelu,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "identity": lambda u: u,
    "elu": lambda u: F.elu(u) + 1,
}


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    *,
    kernel: str = "softmax",
    causal: bool = False,
    window: int = 0,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    oprf_a: float | tuple[float, ...] = 0.0,
    far_share: Tensor | None = None,
    decay: Tensor | None = None,
    gate: Tensor | None = None,
    operands: torch.dtype | None = None,
) -> Tensor:
    """Σ_j w_ij v_j / Σ_j w_ij over the keys j that query i sees.

    w_ij is exp(q_iᵀk_j/√d) inside the window and φ(q_i)ᵀφ(k_j) outside it, both in true scale.

    Args:
        q, k, v: (batch, heads, L, d or e), any dtype; computed in float64.
        projection: ω, one row a projection: m rows, m/2 for "hyperbolic" and "trigonometric"; None for "relu_direct".
        kernel: a name of ``feature_maps.KERNELS``. "smreg" is "softmax": what differs is the projection.
        causal: only keys j ≤ i.
        window: pairs with |i − j| < window are exact; 0 for none.
        key_padding: (batch, L) bool, True where a key is real. 1 = keep.
        segments: (batch, L) integers. Maximal runs of equal neighbours are documents; none sees another.
        oprf_a: A ≤ 0 of "oprf"; of "sderf" and "aderf" one a coordinate.
        far_share: (heads,), log of a factor on every feature pair.
        decay: (heads,), γ ≥ 0: every weight is multiplied by exp(−γ|i − j|).
        gate: (batch, heads, L), log f ≤ 0: every weight is multiplied by the f of positions j + 1 … i, or i + 1 … j.
        operands: bf16 or fp16: the ω·d^-1/4 (for "oprf" √(1−4A)·ω·d^-1/4) that q and k are multiplied by are rounded
            to it. None: they are not.

    Returns:
        (batch, heads, L, e) float64; zeros for a query that sees no key.
    """
    q, k, v = (t.double() for t in (q, k, v))
    x, y = (t * t.shape[-1] ** -0.25 for t in (q, k))
    distance = (torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])).abs().to(q.device)

    sign, log_w = _feature_products(x, y, None if projection is None else projection.double(), kernel, oprf_a, operands)
    if far_share is not None:
        log_w = log_w + far_share.double()[:, None, None]
    log_w = torch.where(distance < window, x @ y.mT, log_w)
    sign = torch.where(distance < window, 1.0, sign)
    if decay is not None:
        log_w = log_w - decay.double()[:, None, None] * distance

    if gate is not None:
        at = torch.arange(q.shape[-2], device=q.device)
        low, high = (f(at[:, None], at)[..., None] for f in (torch.minimum, torch.maximum))
        log_w = log_w + torch.einsum("bhl,ijl->bhij", gate.double(), ((low < at) & (at <= high)).double())
    visible = torch.ones_like(log_w, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, :]
    if segments is not None:
        document = F.pad(segments.diff(dim=-1) != 0, (1, 0)).cumsum(-1)
        visible = visible & (document[:, None, :, None] == document[:, None, None, :])

    log_w = log_w.masked_fill(~visible, -torch.inf)
    top = log_w.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    w = sign * torch.exp(log_w - top)
    blind = ~visible.any(-1, keepdim=True)
    return (w @ v) / w.sum(-1, keepdim=True).masked_fill(blind, 1.0)


def _feature_products(
    x: Tensor,
    y: Tensor,
    omega: Tensor | None,
    kernel: str,
    oprf_a: float | tuple[float, ...],
    operands: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Sign and log-magnitude of φ(x_i)ᵀφ(y_j), (batch, heads, Lq, Lk) each."""
    scale = x.shape[-1] ** -0.25

    def rounded(omega: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        return omega if operands is None else (omega * scale * factor).to(operands).double() / (scale * factor)

    def half_norm(x: Tensor) -> Tensor:
        return x.square().sum(-1, keepdim=True) / 2

    if omega is None:
        if kernel != "relu_direct":
            raise ValueError(f"kernel {kernel!r} needs a projection")
        one = rounded(x.new_ones(()))
        product = (torch.relu(one * x) + _EPSILON) @ (torch.relu(one * y) + _EPSILON).mT
        return product.sign(), product.abs().log()

    rows, d = omega.shape
    if kernel == "trigonometric":
        u, w = x @ rounded(omega).T, y @ rounded(omega).T
        product = (u.cos() @ w.cos().mT + u.sin() @ w.sin().mT) / rows
        return product.sign(), product.abs().log() + half_norm(x) + half_norm(y).mT
    if kernel in _GENERALISED:
        f = _GENERALISED[kernel]
        product = (f(x @ rounded(omega).T) + _EPSILON) @ (f(y @ rounded(omega).T) + _EPSILON).mT / rows
        return product.sign(), product.abs().log()

    def log_phi(x: Tensor) -> Tensor:
        a = torch.tensor(oprf_a, dtype=x.dtype, device=x.device)
        root = (1 - 4 * a).sqrt()
        u = (x * root) @ rounded(omega, root).T
        if kernel in ("softmax", "smreg"):
            return u - half_norm(x) - math.log(rows) / 2
        if kernel == "hyperbolic":
            return torch.cat((u, -u), -1) - half_norm(x) - math.log(2 * rows) / 2
        if kernel in ("oprf", "sderf", "aderf"):
            exponent = (a * omega.square()).sum(-1) + u - half_norm(x)
            return exponent + root.expand(d).log().sum() / 2 - math.log(rows) / 2
        if kernel == "exp":
            return torch.logaddexp(u, torch.full_like(u, math.log(_EPSILON))) - math.log(rows) / 2
        raise ValueError(f"no reference for kernel {kernel!r}")

    log_product = torch.logsumexp(log_phi(x)[..., :, None, :] + log_phi(y)[..., None, :, :], dim=-1)
    return torch.ones_like(log_product), log_product
