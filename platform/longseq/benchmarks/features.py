"""How good the random features are: each estimator next to its closed form, and attention's error against m.

Both measurements go through ``feature_map``, so they measure what training runs. x = q·d^-1/4 and y = k·d^-1/4 as in
``longseq.attention.feature_maps``; SM = exp(xᵀy). ``projections`` counts rows ω, m: the hyperbolic and the
trigonometric map have two features a row, and the paper compares at equal m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.attention.projections import projection_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM = 16  # d of both measurements, and m of the first

_FEATURES_A_PROJECTION = {"softmax": 1, "hyperbolic": 2, "trigonometric": 2}
_NAMES = {"softmax": "positive", "hyperbolic": "hyperbolic", "trigonometric": "trigonometric"}


@dataclass(frozen=True)
class Pair:
    """Two vectors x and y by their lengths and the angle between them in degrees."""

    x: float
    y: float
    angle: float

    @property
    def dot(self) -> float:
        return self.x * self.y * math.cos(math.radians(self.angle))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """x and y (DIM,), float64. Which plane they lie in is no matter: the rows' distribution knows no direction."""
        x, y = torch.zeros(2, DIM, dtype=torch.float64)
        x[0] = self.x
        y[0], y[1] = self.dot / self.x, self.y * math.sin(math.radians(self.angle))
        return x, y


# ‖x + y‖² stays near 1 or below: beyond, the squared error is so heavy-tailed that 10^5 draws do not show its mean.
PAIRS = (Pair(0.5, 0.5, 30), Pair(0.7, 0.7, 90), Pair(0.8, 0.8, 120), Pair(1.0, 1.0, 150))


@dataclass(frozen=True)
class EstimatorError:
    """Mean squared error of one estimator of exp(xᵀy) at d = m = 16.

    Attributes:
        estimator: "positive", "hyperbolic" or "trigonometric" with independent rows, or "orthogonal": positive with
            block-orthogonal ones.
        measured: the mean over the draws.
        standard_error: of that mean.
        formula: the closed form, or for "orthogonal" the upper bound.
    """

    estimator: str
    pair: Pair
    measured: float
    standard_error: float
    formula: float
    formula_is_bound: bool


@dataclass(frozen=True)
class AttentionError:
    """Error of softmax attention by random features: mean and standard deviation over draws of inputs and projections.

    Attributes:
        estimator: "positive", "hyperbolic" or "trigonometric".
        projection: "orthogonal" or "iid".
        projections: number of rows, m.
        std: of q and k.
        matrix: ‖Â − A‖ / ‖A‖ of the attention matrix A = softmax(qkᵀ/√d), Frobenius norms.
        output: mean squared error of the attention's output, for values of variance 1.
    """

    estimator: str
    projection: str
    projections: int
    std: float
    matrix: float
    matrix_std: float
    output: float
    output_std: float


def closed_form(estimator: str, pair: Pair) -> float:
    """Mean squared error at m = d = 16 (Choromanski et al. 2020, Lemma 2 and Theorem 2; "orthogonal": upper bound)."""
    m = d = DIM
    sm, squares = math.exp(pair.dot), pair.x**2 + pair.y**2
    plus, minus = squares + 2 * pair.dot, squares - 2 * pair.dot  # ‖x ± y‖²
    if estimator == "trigonometric":
        return math.exp(plus) / sm**2 * (1 - math.exp(-minus)) ** 2 / (2 * m)
    positive = math.exp(plus) * sm**2 * (1 - math.exp(-plus)) / m
    if estimator == "hyperbolic":
        return (1 - math.exp(-plus)) / 2 * positive
    if estimator == "orthogonal":
        return positive - 2 * (m - 1) / (m * (d + 2)) * (sm - math.exp(-squares / 2)) ** 2
    return positive


def measure_estimators(*, draws: int = 100_000, seed: int = 0, pairs: Sequence[Pair] = PAIRS) -> list[EstimatorError]:
    """Mean squared error of each estimator for each pair, over ``draws`` projection matrices (rounded up to 4,096)."""
    at_once = 4096
    vectors = [pair.vectors() for pair in pairs]
    q, k = (torch.stack(side) * DIM**0.25 for side in zip(*vectors, strict=True))  # (pairs, d)
    sm = torch.tensor([math.exp(pair.dot) for pair in pairs], dtype=torch.float64)[:, None]
    maps = [(name, kernel, "iid") for kernel, name in _NAMES.items()] + [("orthogonal", "softmax", "orthogonal")]
    squared: dict[str, list[Tensor]] = {name: [] for name, *_ in maps}  # (pairs, at_once) each
    for draw in range(-(-draws // at_once)):
        for name, kernel, projection in maps:
            # Blocks of d rows are independent of each other, so one map of 4,096 · d rows is 4,096 maps of m = d.
            rows = _FEATURES_A_PROJECTION[kernel]
            many = feature_map(
                kernel, rows * at_once * DIM, DIM, seed=seed, draw=draw, projection=projection, dtype=torch.float64
            )
            (fq, q_scale), (fk, k_scale) = many.queries(q), many.keys(k)
            terms = fq.mul_(fk).mul_(torch.exp(q_scale + k_scale))  # (pairs, rows · 4,096 · m)
            estimates = terms.view(len(pairs), rows, at_once, DIM).sum((1, 3)) * at_once
            squared[name].append((estimates - sm).square())
        projection_matrix.cache_clear()  # 16 MB a draw, wanted no more
    results = []
    for name, errors in squared.items():
        for pair, error in zip(pairs, torch.cat(errors, 1), strict=True):
            standard_error = error.std().item() / math.sqrt(len(error))
            formula = closed_form(name, pair)
            results.append(
                EstimatorError(name, pair, error.mean().item(), standard_error, formula, name == "orthogonal")
            )
    return results


def measure_attention_error(
    *,
    projections: Sequence[int] = (16, 32, 64, 128, 256),
    kernels: Sequence[str] = ("softmax", "trigonometric"),
    length: int = 4096,
    stds: Sequence[float] = (0.5, 1.0),
    draws: int = 15,
    seed: int = 0,
) -> list[AttentionError]:
    """The setting of Figure 4 of arXiv 2009.14794: bidirectional attention, L = 4,096, d = 16, error against m.

    Args:
        projections: the values of m.
        kernels: "softmax" (positive features), "hyperbolic", "trigonometric".
        length: of the sequence.
        stds: of the normally distributed q and k; v has 1. Which estimator wins depends on it, and at 1 the positive
            features' error is so heavy-tailed that more of them hardly help.
        draws: how many times inputs and projections are drawn; all estimators see the same inputs.
        seed: of both.
    """
    rng = torch.Generator().manual_seed(seed)
    errors: dict[tuple[float, str, str, int], list[tuple[float, float]]] = {}
    for std, draw in product(stds, range(draws)):
        q, k, v = torch.randn(3, length, DIM, generator=rng)
        q, k = q * std, k * std
        exact = torch.softmax(q @ k.T * DIM**-0.5, -1)  # (L, L)
        for kernel, projection, m in product(kernels, ("orthogonal", "iid"), projections):
            features = m * _FEATURES_A_PROJECTION[kernel]
            one = feature_map(kernel, features, DIM, seed=seed, draw=draw, projection=projection)
            errors.setdefault((std, kernel, projection, m), []).append(_attention_error(one, q, k, v, exact))
    results = []
    for (std, kernel, projection, m), pairs in errors.items():
        both = torch.tensor(pairs, dtype=torch.float64)  # (draws, 2)
        spread = both.std(0, correction=1 if draws > 1 else 0)
        (matrix, out), (matrix_std, out_std) = both.mean(0).tolist(), spread.tolist()
        results.append(AttentionError(_NAMES[kernel], projection, m, std, matrix, matrix_std, out, out_std))
    return results


def table(estimators: Sequence[EstimatorError], attention: Sequence[AttentionError]) -> str:
    """Both measurements as plain text; an empty one is left out."""
    lines = []
    if estimators:
        lines += [f"Mean squared error of exp(xᵀy), d = m = {DIM}", ""]
        lines += [f"{'estimator':<14} {'‖x‖':>5} {'‖y‖':>5} {'angle':>6} {'measured':>10}   {'':<5}{'closed form':>11}"]
        for e in estimators:
            relation = "bound" if e.formula_is_bound else f"{e.measured / e.formula - 1:+.1%}"
            pair = f"{e.pair.x:>5} {e.pair.y:>5} {e.pair.angle:>5}°"
            lines += [
                f"{e.estimator:<14} {pair} {e.measured:>10.5f} ± {e.standard_error:.5f} {e.formula:>8.5f}  {relation}"
            ]
    if attention:
        lines += [""] if lines else []
        lines += ["Error of attention by random features (mean ± standard deviation over draws)", ""]
        lines += [f"{'estimator':<14} {'projection':<11} {'std':>5} {'m':>5}   {'matrix, relative':<21}  output, MSE"]
        for a in attention:
            matrix, out = f"{a.matrix:.4g} ± {a.matrix_std:.2g}", f"{a.output:.3g} ± {a.output_std:.2g}"
            lines += [f"{a.estimator:<14} {a.projection:<11} {a.std:>5} {a.projections:>5}   {matrix:<21}  {out}"]
    return "\n".join(lines)


def as_dict(
    estimators: Sequence[EstimatorError], attention: Sequence[AttentionError]
) -> dict[str, list[dict[str, object]]]:
    """Both measurements as numbers and text that JSON can hold."""
    return {"estimators": [asdict(e) for e in estimators], "attention": [asdict(a) for a in attention]}


def figure(attention: Sequence[AttentionError]) -> Figure:
    """Error against m on logarithmic axes, one column a size of q and k: the matrix above, the output below.

    ``figure(rows).savefig(path)`` writes it; no display is needed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stds = list(dict.fromkeys(row.std for row in attention))
    drawing = Figure(figsize=(4.5 * len(stds), 7), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(2, len(stds), squeeze=False)
    for column, std in enumerate(stds):
        matrix, output = panels[:, column]
        for estimator, projection in dict.fromkeys((row.estimator, row.projection) for row in attention):
            rows = [r for r in attention if (r.std, r.estimator, r.projection) == (std, estimator, projection)]
            m, line = [r.projections for r in rows], "-" if projection == "orthogonal" else "--"
            label = f"{estimator}, {projection}"
            matrix.errorbar(m, [r.matrix for r in rows], [r.matrix_std for r in rows], ls=line, marker="o", label=label)
            output.errorbar(m, [r.output for r in rows], [r.output_std for r in rows], ls=line, marker="o")
        matrix.set(title=f"q and k of standard deviation {std:g}", ylabel="attention matrix, relative error")
        output.set(xlabel="projections m", ylabel="output, mean squared error")
    m = sorted({row.projections for row in attention})
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xticks=m, xticklabels=[str(number) for number in m])
        axes.grid(True, which="both", alpha=0.3)
    panels[0, 0].legend()
    return drawing


def _attention_error(one: FeatureMap, q: Tensor, k: Tensor, v: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative error of the matrix and mean squared error of the output."""
    phi_q, phi_k = (features * torch.exp(scale) for features, scale in (one.queries(q), one.keys(k)))
    phi_q /= phi_q @ phi_k.sum(0)[:, None]  # the rows of the matrix sum to 1
    squared = sum(
        (rows @ phi_k.T).sub_(exact_rows).square_().sum().item()  # a block of rows, not another L × L matrix
        for rows, exact_rows in zip(phi_q.split(512), exact.split(512), strict=True)
    )
    output_error = phi_q @ (phi_k.T @ v) - exact @ v
    return math.sqrt(squared) / exact.norm().item(), output_error.square().mean().item()
