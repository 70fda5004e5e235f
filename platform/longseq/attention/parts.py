"""Attention over disjoint sets of keys, put together: softmax attention's own algebra of (out, log-denominator)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]  # out (N, L, e) and lse (N, L, 1)


def combine(parts: Sequence[Part]) -> Part:
    """One numerator and one denominator over the keys of all parts.

    out = Σ_p e^{lse_p} out_p / Σ_p e^{lse_p}: each part's output is weighted by its denominator. A query that sees no
    key in any part (all lse −1e30) gets zeros, as its parts are.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part[1] for part in parts])  # (P, N, L, 1)
    total = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - total)
    out = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=False):
        out = torch.addcmul(out, part, weight)
    return out, total


def combine_vjp(part: Part, whole: Part, dout: Tensor, dlse: Tensor) -> Part:
    """Gradients (N, L, e) and (N, L, 1) of one part, from those of the ``whole`` that :func:`combine` made."""
    weight = torch.exp(part[1] - whole[1])
    return weight * dout, weight * (dlse + (dout * (part[0] - whole[0])).sum(-1, keepdim=True))
