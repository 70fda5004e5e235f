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

# Features below e^-40 (float64: e^-340) of the largest of their own row are lifted to it, so that the product of any
# two is a normal number and every denominator with one visible key is positive. For the q and k of a trained layer
# this is far below rounding. It shows where fp32's range ends: beyond a standard deviation of about 4 at head_dim 64,
# where a query and a key may have no large feature in common.
_LOG_FLOOR = {torch.float32: -40.0, torch.float64: -340.0}


class FeatureMap(Protocol):
    """What attention asks of a kernel. Inputs (..., L, d) in fp32 or float64; features (..., L, m)."""

    @property
    def features(self) -> int:
        """The number of features, m."""

    def queries(self, q: Tensor) -> Tensor:
        """Features (..., L, m). A query's log-scale cancels in the attention's quotient and is left out."""

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., L, m) and log-scale (..., L, 1). The log-scale carries no gradient."""

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to q (..., L, d), given the features and their gradient (..., L, m)."""

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """As :meth:`queries_vjp`, for keys."""


@dataclass(frozen=True)
class _Projected:
    """A map that begins with ωᵀx, x = q·d^-1/4."""

    projection: Tensor  # (m, d), rows ω

    @property
    def features(self) -> int:
        return self.projection.shape[0]

    def scaled_projection(self, x: Tensor) -> Tensor:
        """ω·d^-1/4 in the dtype of ``x``: x enters scaled without a copy of it."""
        return self.projection.to(x) * x.shape[-1] ** -0.25


@dataclass(frozen=True)
class PositiveSoftmax(_Projected):
    """φ(x) = m^-1/2 · exp(ωᵀx − ‖x‖²/2), x = q·d^-1/4: unbiased for exp(qᵀk/√d) (Choromanski et al. 2020, Lemma 1).

    The factor exp(−‖x‖²/2) of a query cancels in the quotient, and so does the gradient of its norm.
    """

    def queries(self, q: Tensor) -> Tensor:
        return self._bounded(q)[0]

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        features, top = self._bounded(k)
        half_norm = k.square().sum(-1, keepdim=True) * (0.5 * k.shape[-1] ** -0.5)
        return features, top - half_norm - 0.5 * math.log(self.features)

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return (grad * features) @ self.scaled_projection(q)

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        d_exponent = grad * features
        norm_grad = d_exponent.sum(-1, keepdim=True) * k.shape[-1] ** -0.5
        return torch.addcmul(d_exponent @ self.scaled_projection(k), norm_grad, k, value=-1)

    def _bounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """exp(ωᵀx − max ωᵀx) (..., L, m), and the maximum of each row (..., L, 1)."""
        exponent = x @ self.scaled_projection(x).T
        top = exponent.amax(-1, keepdim=True)
        return exponent.sub_(top).clamp_(min=_LOG_FLOOR[x.dtype]).exp_(), top


@dataclass(frozen=True)
class ReLU(_Projected):
    """φ(x) = m^-1/2 · (ReLU(ωᵀx) + ε), x = q·d^-1/4: Performer-ReLU (Choromanski et al. 2020, section 4; ε = 1e-3)."""

    epsilon: float = 1e-3

    def queries(self, q: Tensor) -> Tensor:
        return (q @ self.scaled_projection(q).T).relu_().add_(self.epsilon)

    def keys(self, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.queries(k), k.new_full((*k.shape[:-1], 1), -0.5 * math.log(self.features))

    def queries_vjp(self, q: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return (grad * (features > self.epsilon)) @ self.scaled_projection(q)

    def keys_vjp(self, k: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return self.queries_vjp(k, features, grad)


# Each kernel by the name that configurations use.
FEATURE_MAPS: dict[str, type[PositiveSoftmax] | type[ReLU]] = {"softmax": PositiveSoftmax, "relu": ReLU}
