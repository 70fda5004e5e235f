"""How the loss falls with size and data: loss(N, D) = E + A / N^α + B / D^β, fitted to runs (Hoffmann et al. 2022,
arXiv 2203.15556, approach 3), and what it says of a larger one. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longseq.errors import LongseqError

Floats = npt.NDArray[np.float64]

DELTA = 1e-3  # of Huber's loss on log(loss): theirs
_ROUNDS = 200  # of Levenberg and Marquardt
_RESAMPLED = 200  # fits of an interval
_EXPONENTS = (0.1, 0.3, 0.7, 1.5)  # where fits begin; theirs end at 0.34 and 0.28
_LIMIT = 3.0  # of an exponent


class Point(NamedTuple):
    """A trained model."""

    parameters: int
    tokens: int
    loss: float  # nats


@dataclass(frozen=True)
class Law:
    """A fit. Without ``data`` it holds for as many tokens per parameter as all of its points have."""

    irreducible: float  # E
    size: float  # A, of N in parameters
    size_exponent: float  # α
    data: float  # B, of D in tokens
    data_exponent: float  # β

    def loss(self, parameters: float, tokens: float) -> float:
        falls = self.size / parameters**self.size_exponent
        return self.irreducible + falls + (self.data / tokens**self.data_exponent if self.data else 0.0)


@dataclass(frozen=True)
class Prediction:
    """The loss of a model that was not trained."""

    parameters: int
    tokens: int
    loss: float
    low: float | None  # 95 %; None: there are no more points than the law has numbers
    high: float | None


def check(models: Sequence[tuple[int, int]]) -> None:
    """Refuse to train models of these (parameters, tokens), where their losses would tell no law.

    Raises:
        LongseqError: for too few of them.
    """
    _Problem.of([Point(parameters, tokens, 1.0) for parameters, tokens in models])


def fit(points: Sequence[Point]) -> Law:
    """The law of these points: the smallest Huber loss on log(loss), from many beginnings.

    Raises:
        LongseqError: for too few points, and a loss that is no number above 0.
    """
    problem = _Problem.of(points)
    return problem.law(problem.solved(problem.log_loss[None], problem.beginnings())[0])


def predict(points: Sequence[Point], parameters: int, tokens: int) -> Prediction:
    """The loss at a size, with an interval: residuals are drawn again for the points and for what is predicted (a
    bootstrap; they are made larger by √(n / (n − p)), as a fit with p numbers makes them smaller).

    Raises:
        LongseqError: as :func:`fit` does.
    """
    problem = _Problem.of(points)
    best = problem.solved(problem.log_loss[None], problem.beginnings())[0]
    at = problem.values(best[None], *problem.place(parameters, tokens))[0][0, 0]
    n, p = len(points), problem.numbers
    if n <= p:
        return Prediction(parameters, tokens, math.exp(at), None, None)
    fitted = problem.values(best[None], problem.n, problem.d)[0][0]
    residuals = (problem.log_loss - fitted) * math.sqrt(n / (n - p))
    draws = np.random.Generator(np.random.Philox(key=0)).random((_RESAMPLED, n + 1))
    drawn = residuals[(draws * n).astype(np.int64)]
    # A fit to few points has several valleys: each resample begins in the one that was found, and in others.
    beginnings = np.concatenate([best[None], problem.beginnings()[::29]])
    fits = problem.solved(fitted + drawn[:, :n], beginnings)
    found = problem.values(fits, *problem.place(parameters, tokens))[0][:, 0] + drawn[:, n]
    low, high = np.exp(np.quantile(found, [0.025, 0.975]))
    return Prediction(parameters, tokens, math.exp(at), float(low), float(high))


@dataclass(frozen=True)
class _Problem:
    """Numbers are (log E, log A', log α, log B', log β), the last two with ``both``; A' and B' are those of N and D by
    their geometric means, which keeps them apart from the exponents."""

    n: Floats  # log(N / mean), (points,)
    d: Floats
    log_loss: Floats
    means: tuple[float, float]  # logs
    both: bool

    @staticmethod
    def of(points: Sequence[Point]) -> _Problem:
        for point in points:
            if not 0 < point.loss < math.inf:
                raise LongseqError(
                    f"a loss of {point.loss:g} at {point.parameters:,} weights and {point.tokens:,} tokens is that of "
                    "no law: look at that run, or take a lower rate."
                )
        n, d, loss = (np.log(np.array(values, dtype=np.float64)) for values in zip(*points, strict=True))
        means = float(n.mean()), float(d.mean())
        n, d = n - means[0], d - means[1]
        apart = np.linalg.svd(np.stack([n, d]), compute_uv=False)[1] > 0.05 * math.sqrt(len(points))
        both = bool(apart) and len(points) >= 5
        if len(set(n.tolist())) < 3 and not both:
            raise LongseqError(
                f"{len(points)} runs of {len(set(n.tolist()))} sizes tell no law of the loss: take three sizes, "
                "or five runs of two sizes and several budgets."
            )
        return _Problem(n, d, loss, means, both)

    @property
    def numbers(self) -> int:
        return 5 if self.both else 3

    def place(self, parameters: float, tokens: float) -> tuple[Floats, Floats]:
        logs = math.log(parameters) - self.means[0], math.log(tokens) - self.means[1]
        return np.array([logs[0]]), np.array([logs[1]])

    def beginnings(self) -> Floats:
        """(starts, numbers)."""
        least = math.exp(self.log_loss.min())
        shares = (0.5, 0.8, 0.95)  # of the least loss that is irreducible
        amounts = (0.03, 0.3)  # A' and B', of the least loss
        term = list(itertools.product(np.log(np.array(amounts) * least), np.log(_EXPONENTS)))
        terms = itertools.product(term, term) if self.both else ((one,) for one in term)
        logs = [math.log(share * least) for share in shares]
        return np.array([[e, *itertools.chain(*each)] for each in terms for e in logs])

    def values(self, x: Floats, n: Floats, d: Floats) -> tuple[Floats, Floats]:
        """log(loss) at n, d (points,) of numbers x (starts, numbers), (starts, points); and its derivatives."""
        parts, slopes = [np.repeat(x[:, :1], len(n), 1)], []
        for at, places in ((1, n), (3, d))[: 1 + self.both]:
            exponent = np.minimum(np.exp(x[:, at + 1 : at + 2]), _LIMIT)
            parts.append(x[:, at : at + 1] - exponent * places)
            slopes.append(-exponent * places)
        stacked = np.stack(parts)  # (terms, starts, points)
        top = stacked.max(0)
        shares = np.exp(stacked - top)
        total = shares.sum(0)
        shares /= total
        columns = [shares[0]]
        for share, slope in zip(shares[1:], slopes, strict=True):
            columns += [share, share * slope]
        return top + np.log(total), np.stack(columns, -1)

    def solved(self, wanted: Floats, beginnings: Floats) -> Floats:
        """The best numbers of each row of log losses (rows, points): (rows, numbers)."""
        rows, starts = len(wanted), len(beginnings)
        x = np.tile(beginnings, (rows, 1))
        target = np.repeat(wanted, starts, 0)
        damping = np.full(len(x), 1e-2)
        cost, jacobian, residual = self._looked(x, target)
        for _ in range(_ROUNDS):
            weight = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))
            weighted = jacobian * weight[..., None]
            square = np.einsum("spi,spj->sij", weighted, jacobian)
            gradient = np.einsum("spi,sp->si", weighted, residual)
            scale = np.einsum("sii->si", square) + 1e-9
            damped = square + (damping[:, None] * scale)[..., None] * np.eye(x.shape[1])
            trial = np.clip(x - np.linalg.solve(damped, gradient[..., None])[..., 0], -30, 30)
            new = self._looked(trial, target)
            better = new[0] < cost
            gained = np.where(better, cost - new[0], 0.0)
            x = np.where(better[:, None], trial, x)
            cost = np.where(better, new[0], cost)
            jacobian = np.where(better[:, None, None], new[1], jacobian)
            residual = np.where(better[:, None], new[2], residual)
            damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
            if (gained <= 1e-9 * cost).all() and (damping[~better] > 1e6).all():
                break
        best = cost.reshape(rows, starts).argmin(1)
        return x.reshape(rows, starts, -1)[np.arange(rows), best]

    def _looked(self, x: Floats, target: Floats) -> tuple[Floats, Floats, Floats]:
        """Huber's loss, derivatives and residuals."""
        values, jacobian = self.values(x, self.n, self.d)
        residual = values - target
        size = np.abs(residual)
        huber = np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
        return huber.sum(1), jacobian, residual

    def law(self, x: Floats) -> Law:
        terms = []
        for at, mean in zip((1, 3)[: 1 + self.both], self.means, strict=False):
            exponent = min(math.exp(x[at + 1]), _LIMIT)
            terms += [math.exp(x[at] + exponent * mean), exponent]
        size, size_exponent, data, data_exponent = (*terms, 0.0, 0.0)[:4]
        return Law(math.exp(x[0]), size, size_exponent, data, data_exponent)
