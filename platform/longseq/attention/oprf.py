"""The constant A of kernel "oprf" that makes its estimates vary least, from queries and keys; and what A does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longseq.attention.options import OprfA


def oprf_parameter(q: Tensor, k: Tensor) -> float:
    """A ≤ 0 of least variance for ``oprf``, from q and k (batch, heads, L, d) as attention gets them.

    Likhosherstov et al. 2022, arXiv 2205.15317, with the mean of ‖x + y‖² over all pairs of a query and a key of the
    same head. Choose it once from data and keep it: an A computed from the sequence itself would let later keys
    change earlier outputs.
    """
    return oprf_a_from_moments(oprf_moments(q, k))


def oprf_moments(q: Tensor, k: Tensor) -> Tensor:
    """Sums that :func:`oprf_a_from_moments` turns into A: add them over batches and ranks.

    Args:
        q, k: (batch, heads, L, d).

    Returns:
        (2, heads, d + 2) float64: for the queries and for the keys Σx, Σ‖x‖² and their number.
    """

    def sums(t: Tensor) -> Tensor:
        x = t.detach().double() * t.shape[-1] ** -0.25
        squares = x.square().sum(-1, keepdim=True)
        return torch.cat((x, squares, torch.ones_like(squares)), -1).sum((0, 2))

    return torch.stack((sums(q), sums(k)))


def oprf_a_from_moments(moments: Tensor) -> float:
    """A from the sum of any number of :func:`oprf_moments`."""
    mean_q, mean_k = moments[..., :-1] / moments[..., -1:]  # (heads, d + 1) each
    d = mean_q.shape[-1] - 1
    squared = mean_q[:, -1] + mean_k[:, -1] + 2 * (mean_q[:, :-1] * mean_k[:, :-1]).sum(-1)  # mean ‖x + y‖²
    ratio = max(squared.mean().item(), 0.0) / d
    return best_a(ratio)


def best_a(size: float) -> float:
    """A ≤ 0 of least variance for a coordinate of x + y with this mean square."""
    made: float = (1 - 2 * size - math.sqrt((2 * size + 1) ** 2 + 8 * size)) / 16
    return made


def stretch(a: OprfA) -> OprfA:
    """√(1 − 4A), by which ω is multiplied: of the coordinates of A's diagonal, or one number."""
    return tuple((1 - 4 * one) ** 0.5 for one in a) if isinstance(a, tuple) else (1 - 4 * a) ** 0.5


def shift(omega: Tensor, a: OprfA, dtype: torch.dtype) -> Tensor | None:
    """ωᵀAω of each row of ω, (m,)."""
    squares = omega.square()
    if isinstance(a, tuple):
        return (squares @ torch.tensor(a, dtype=omega.dtype, device=omega.device)).to(dtype)
    return (squares.sum(-1) * a).to(dtype) if a else None


def log_factor(a: OprfA, head_dim: int) -> float:
    """log det(1 − 4A)^1/4."""
    if isinstance(a, tuple):
        return sum(math.log(1 - 4 * one) for one in a) / 4
    return head_dim / 4 * math.log(1 - 4 * a)
