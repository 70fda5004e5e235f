"""The constant A of kernel "oprf" that makes its estimates vary least, from queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    made: float = (1 - 2 * ratio - math.sqrt((2 * ratio + 1) ** 2 + 8 * ratio)) / 16
    return made
