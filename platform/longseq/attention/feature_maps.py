"""Feature maps φ with κ(q, k) = E[φ(q)ᵀφ(k)], each row split into bounded features and a log-scale.

φ(x) = features · exp(log_scale), the log-scale one number a row. Keeping it apart is what lets attention run in fp32
without an epsilon: a query's scale cancels between numerator and denominator, a key's travels in the state.
A row's split depends on that row alone, so no key can influence what comes before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Features below e^-40 of the largest of their own row are lifted to it. In the row's sum that is 1e10 times below
# fp32's resolution, so it is rounding and no regulariser; but it keeps the product of any two features (≥ e^-80)
# inside fp32's normal range, so that every denominator with one visible key is positive.
_LOG_FLOOR = -40.0


class FeatureMap(Protocol):
    """What attention asks of a kernel. Inputs (..., L, d) in fp32 or float64; features (..., L, m)."""

    @property
    def features(self) -> int:
        """The number of features, m."""

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., L, m) and log-scale (..., L, 1). The log-scale carries no gradient."""

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`queries`, for keys."""

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to q (..., L, d), given the features and their gradient (..., L, m)."""

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """As :meth:`queries_vjp`, for keys."""


@dataclass(frozen=True)
class PositiveSoftmax:
    """φ(x) = m^-1/2 · exp(ωᵀx − ‖x‖²/2), x = q·d^-1/4: unbiased for exp(qᵀk/√d) (Choromanski et al. 2020, Lemma 1).

    The factors m^-1/2, and exp(−‖x‖²/2) on the query's side, cancel in the attention's quotient; they stand in the
    log-scale, and the gradient of the query's norm is left out because it is zero.
    """

    projection: Tensor  # (m, d), rows ω

    @property
    def features(self) -> int:
        return self.projection.shape[0]

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(q)

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(k)

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return (grad * features) @ self._scaled_projection(q)

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        d_exponent = grad * features
        norm_grad = d_exponent.sum(-1, keepdim=True) * k.shape[-1] ** -0.5
        return torch.addcmul(d_exponent @ self._scaled_projection(k), norm_grad, k, value=-1)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exponent = x @ self._scaled_projection(x).T  # (..., L, m)
        top = exponent.amax(-1, keepdim=True)
        half_norm = x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        features = exponent.sub_(top).clamp_(min=_LOG_FLOOR).exp_()
        return features, top - half_norm - 0.5 * math.log(self.features)

    def _scaled_projection(self, x: Tensor) -> Tensor:
        return self.projection.to(x) * x.shape[-1] ** -0.25


@dataclass(frozen=True)
class ReLU:
    """φ(x) = m^-1/2 · (ReLU(ωᵀx) + ε), x = q·d^-1/4: Performer-ReLU (Choromanski et al. 2020, section 4; ε = 1e-3)."""

    projection: Tensor  # (m, d), rows ω
    epsilon: float = 1e-3

    @property
    def features(self) -> int:
        return self.projection.shape[0]

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(q)

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._features(k)

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return (grad * (features > self.epsilon)) @ self._scaled_projection(q)

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return self.queries_vjp(k, features, grad)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = (x @ self._scaled_projection(x).T).relu_().add_(self.epsilon)
        return features, features.new_full((*features.shape[:-1], 1), -0.5 * math.log(self.features))

    def _scaled_projection(self, x: Tensor) -> Tensor:
        return self.projection.to(x) * x.shape[-1] ** -0.25


# Each kernel by the name that configurations use.
FEATURE_MAPS: dict[str, type[PositiveSoftmax] | type[ReLU]] = {"softmax": PositiveSoftmax, "relu": ReLU}
