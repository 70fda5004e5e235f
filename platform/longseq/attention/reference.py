"""The obvious quadratic attention of the same features, in float64 and in log space: the oracle of the tests.

Never used in training: it holds the whole L × L matrix, and for the softmax kernel L × L × m exponents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kernel: str = "softmax",
    causal: bool = False,
    key_padding: Tensor | None = None,
) -> Tensor:
    """Σ_j κ(q_i, k_j) v_j / Σ_j κ(q_i, k_j) with κ = φ(q)ᵀφ(k), written down from the definition.

    Args:
        q, k, v: (batch, heads, L, d or e), any dtype; computed in float64.
        projection: ω, (m, d).
        kernel: "softmax" (positive features) or "relu" (ε = 1e-3).
        causal: only keys j ≤ i.
        key_padding: (batch, L) bool, True where a key is real. 1 = keep.

    Returns:
        (batch, heads, L, e) float64; zeros for a query that sees no key.
    """
    q, k, v, omega = (t.double() for t in (q, k, v, projection))
    x, y = (t * t.shape[-1] ** -0.25 for t in (q, k))
    if kernel == "softmax":
        log_q = x @ omega.T - x.square().sum(-1, keepdim=True) / 2
        log_k = y @ omega.T - y.square().sum(-1, keepdim=True) / 2
        log_scores = torch.logsumexp(log_q[..., :, None, :] + log_k[..., None, :, :], dim=-1)  # (B, H, L, L)
    elif kernel == "relu":
        log_scores = torch.log((torch.relu(x @ omega.T) + 1e-3) @ (torch.relu(y @ omega.T) + 1e-3).mT)
    else:
        raise ValueError(f"no reference for kernel {kernel!r}")
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, :]
    weights = torch.softmax(log_scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.nan_to_num(weights, nan=0.0) @ v
