"""Logistic regressions on what a frozen model says, both convex: the same data give the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

_STEPS, _STILL = 5000, 1e-6


@dataclass(frozen=True)
class Scaled:
    """Features by their mean and deviation where they were learned from; those that do not vary there are 0."""

    mean: Floats
    deviation: Floats

    @staticmethod
    def of(features: npt.NDArray[np.floating]) -> Scaled:
        """features: (n, F)."""
        return Scaled(features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64))

    def __call__(self, features: npt.NDArray[np.floating]) -> Floats:
        varies = self.deviation > 1e-12
        return np.where(varies, (features - self.mean) / np.where(varies, self.deviation, 1.0), 0.0)


def sparse_logistic(features: Floats, labels: npt.NDArray[np.bool_], c: float) -> tuple[Floats, float]:
    """Weights (F,) and intercept that minimise |w|₁ + c · Σ log-loss, by FISTA (Beck and Teboulle 2009) with restarts.

    Args:
        features: (n, F), scaled.
        labels: (n,).
        c: of ESM's contact head 0.15 (Rao et al. 2021).
    """
    x = torch.from_numpy(np.concatenate([features, np.ones((len(features), 1))], 1))
    y = torch.from_numpy(labels.astype(np.float64))
    share = min(max(float(y.mean()), 1e-9), 1 - 1e-9)
    w = x.new_zeros(x.shape[1])
    w[-1] = np.log(share / (1 - share))
    step = 4 / (c * float(torch.linalg.eigvalsh(x.T @ x)[-1]))  # 1 / Lipschitz constant of the log-loss's gradient
    threshold = torch.full_like(w, step)
    threshold[-1] = 0  # of the intercept
    ahead, momentum = w, 1.0
    for _ in range(_STEPS):
        moved = ahead - step * c * (x.T @ (torch.sigmoid(x @ ahead) - y))
        after = moved.sign() * (moved.abs() - threshold).clamp_min(0)
        if float((ahead - after) @ (after - w)) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = after + (momentum - 1) / following * (after - w)
        still = float((after - w).abs().max())
        w, momentum = after, following
        if still < _STILL:
            break
    return w[:-1].numpy(), float(w[-1])


def softmax_regression(features: Floats, labels: npt.NDArray[np.int64], classes: int, ridge: float = 1.0) -> Tensor:
    """Weights (F + 1, classes), the intercepts last, that minimise Σ cross entropy + ridge/2 · ‖w‖² without intercepts.

    Args:
        features: (n, F), scaled.
        labels: (n,), from 0.
    """
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    w = x.new_zeros(x.shape[1] + 1, classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ w[:-1] + w[-1]
        value = torch.nn.functional.cross_entropy(logits, y, reduction="sum") + ridge / 2 * w[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return w.detach()
