"""Positive features that fit the queries and keys: each next to its closed form and to plain FAVOR+.

Two kinds of queries and keys: ``even``, normal and alike in all directions; and ``uneven`` as those of trained layers:
with means, and directions that are large in the queries and small in the keys. Both have the standard deviation that is
asked for, over positions and directions together.

What is compared is the second moment of the estimate of one weight by one projection, over the weight squared; 1 is an
estimate that never varies. At larger queries and keys it is the mean of so heavy a tail that no number of plain draws
shows it: projections are drawn near where the square is large, and weighted by what they are short of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from longseq.attention.feature_maps import PositiveExponential, feature_map
from longseq.attention.frames import best_frame, frame_moments
from longseq.attention.oprf import log_factor, oprf_parameter, shift, stretch
from longseq.attention.options import OprfA

DIM = 16
MAPS = ("softmax", "oprf", "sderf", "aderf", "covariance")
INPUTS = ("even", "uneven")
FEATURES = 256
PAIRS = 64


@dataclass(frozen=True)
class Sharpness:
    """One map on one kind of queries and keys.

    Attributes:
        inputs: "even" or "uneven".
        std: of q and k.
        kernel: "covariance" is FAVOR+ with a covariance that makes q and k even, next to its own kernel exp(xᵀΣy).
        measured, formula: mean over 64 pairs of the log of the second moment, by draws and by the closed form.
        worst: the largest distance of the two in any pair, in standard errors of the first.
        matrix: ‖Â − A‖/‖A‖ of the attention matrix with 256 features, the median over draws.
    """

    inputs: str
    std: float
    kernel: str
    measured: float
    formula: float
    worst: float
    matrix: float


def queries_and_keys(inputs: str, std: float, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(length, DIM) each, float64."""
    q, k = torch.randn(2, length, DIM, generator=rng, dtype=torch.float64)
    if inputs == "uneven":
        sizes = torch.logspace(0.4, -0.6, DIM, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(DIM, DIM, generator=rng, dtype=torch.float64))[0]
        means = torch.randn(2, DIM, generator=rng, dtype=torch.float64)
        # Sizes fall in the queries; in the keys they rise again from the middle on.
        q, k = q * sizes @ axes + means[0], k * sizes.roll(DIM // 2) @ axes + means[1]
    return std * q / q.square().mean().sqrt(), std * k / k.square().mean().sqrt()


def coordinates(kernel: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, OprfA]:
    """q and k as this map reads them, and A: best for all of them."""
    if kernel in ("sderf", "aderf"):
        to_q, to_k, centre, a = best_frame(kernel, frame_moments(q[None, None], k[None, None]))
        return q @ to_q[0].T, (k - centre[0]) @ to_k[0].T, tuple(a.tolist())
    if kernel == "covariance":
        both = torch.cat((q, k))
        sizes, axes = torch.linalg.eigh(both.T @ both / len(both))
        metric = axes * (sizes.mean() / sizes).sqrt() @ axes.T
        return q @ metric, k @ metric, 0.0
    return q, k, oprf_parameter(q[None, None], k[None, None]) if kernel == "oprf" else 0.0


def log_second_moment(x: Tensor, y: Tensor, a: OprfA) -> Tensor:
    """log E[(φ(x)φ(y))²]/exp(xᵀy)² of one projection, x and y scaled by d^-1/4; see longseq.attention.frames."""
    t = 1 - 8 * torch.tensor(a, dtype=x.dtype).expand(DIM)
    return (((t + 1) / 2).log() - t.log() / 2 + (x + y).square() / t).sum(-1)


def drawn_second_moment(q: Tensor, k: Tensor, a: OprfA, draws: int, rng: torch.Generator) -> tuple[float, float]:
    """The same of one pair q, k (DIM,) by the features themselves, with the standard error of the log."""
    t = 1 - 8 * torch.tensor(a, dtype=q.dtype).expand(DIM)
    z, spread = (q + k) * DIM**-0.25, (1.2 / t).sqrt()
    mean = 2 * (1 - 4 * torch.tensor(a, dtype=q.dtype)).sqrt() * z / t  # the square is largest here
    normal = torch.randn(draws, DIM, generator=rng, dtype=q.dtype)
    omega = mean + spread * normal
    by = torch.tensor(stretch(a), dtype=q.dtype)
    phi = PositiveExponential(omega * DIM**-0.25 * by, shift(omega, a, q.dtype), log_factor(a, DIM))
    (fq, q_scale), (fk, k_scale) = phi.queries(q[None]), phi.keys(k[None])
    log_square = 2 * (fq.log() + fk.log() + q_scale + k_scale)[0] - 2 * (q @ k) / DIM**0.5
    weight = (normal.square() - omega.square()).sum(-1) / 2 + spread.log().sum()
    logs = log_square + weight
    mean_log = logs.logsumexp(0) - math.log(draws)
    return mean_log.item(), ((logs - mean_log).exp().std() / draws**0.5).item()


def measure_sharpness(
    *,
    stds: Sequence[float] = (0.5, 1.0, 2.0),
    draws: int = 10_000,
    length: int = 1024,
    repeats: int = 15,
    seed: int = 0,
) -> list[Sharpness]:
    """Every map at every size.

    Args:
        stds: of q and k.
        draws: projections for a pair, of 64 pairs.
        length: positions of the attention matrix.
        repeats: draws of its 256 features.
    """
    rng, found = torch.Generator().manual_seed(seed), []
    for inputs, std in product(INPUTS, stds):
        q, k = queries_and_keys(inputs, std, length, rng)
        for kernel in MAPS:
            x, y, a = coordinates(kernel, q, k)
            pairs = list(zip(x[:PAIRS], y[:PAIRS], strict=True))
            formula = log_second_moment(x[:PAIRS] * DIM**-0.25, y[:PAIRS] * DIM**-0.25, a)
            drawn = torch.tensor([drawn_second_moment(*pair, a, draws, rng) for pair in pairs], dtype=x.dtype)
            worst = ((drawn[:, 0] - formula).abs() / drawn[:, 1]).max().item()
            errors = [_matrix_error(kernel, x, y, a, seed, draw) for draw in range(repeats)]
            matrix = torch.tensor(errors, dtype=x.dtype).median().item()
            found.append(
                Sharpness(inputs, std, kernel, drawn[:, 0].mean().item(), formula.mean().item(), worst, matrix)
            )
    return found


def _matrix_error(kernel: str, x: Tensor, y: Tensor, a: OprfA, seed: int, draw: int) -> float:
    name = "softmax" if kernel == "covariance" else kernel
    phi = feature_map(name, FEATURES, DIM, seed=seed, draw=draw, oprf_a=a, dtype=torch.float64)
    (fx, _), (fy, y_scale) = phi.queries(x), phi.keys(y)
    own = fx @ (fy * (y_scale - y_scale.max()).exp()).T
    exact = torch.softmax(x @ y.T / DIM**0.5, -1)
    return ((own / own.sum(-1, keepdim=True) - exact).norm() / exact.norm()).item()


def table(found: Sequence[Sharpness]) -> str:
    lines = [
        f"Second moment of one projection's estimate over the weight squared (mean log; 0: no variance), d = {DIM};",
        f"and error of the attention matrix with {FEATURES} features (median over draws)",
        "",
        f"{'q and k':<8} {'std':>4}  {'map':<11} {'measured':>9} {'closed form':>12} {'at most':>9}   {'matrix':>8}",
    ]
    lines += [
        f"{one.inputs:<8} {one.std:>4}  {one.kernel:<11} {one.measured:>9.4f} {one.formula:>12.4f} "
        f"{one.worst:>7.1f} σ   {one.matrix:>8.4f}"
        for one in found
    ]
    return "\n".join(lines)
