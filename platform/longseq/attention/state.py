"""The attention state: what a linear-attention layer must know of the keys and values it has seen.

State = Σ_j φ(k_j)[v_j, 1]ᵀ, kept as (S, z) · exp(log_scale). Two states add after both are brought to the larger
log-scale; that one merge serves chunks on one device now, and ranks, packed documents and decoding on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The log-scale of a state that has seen nothing. Finite, so that differences of two of them are 0 and not NaN.
_NOTHING = -1e30


@dataclass(frozen=True)
class AttentionState:
    """Sum over keys, for each of N = batch · heads rows.

    Attributes:
        values: S, (N, m, e): Σ φ(k_j) v_jᵀ · exp(−log_scale).
        normaliser: z, (N, m, 1): Σ φ(k_j) · exp(−log_scale).
        log_scale: (N, 1, 1): the largest log-scale of the keys so far, so no term exceeds its bounded features.
    """

    values: Tensor
    normaliser: Tensor
    log_scale: Tensor

    @classmethod
    def empty(cls, rows: int, features: int, value_dim: int, like: Tensor) -> AttentionState:
        """The neutral element of :meth:`merge`, in the device and dtype of ``like``."""
        return cls(
            like.new_zeros(rows, features, value_dim),
            like.new_zeros(rows, features, 1),
            like.new_full((rows, 1, 1), _NOTHING),
        )

    @classmethod
    def of(cls, key_features: Tensor, key_scale: Tensor, v: Tensor) -> AttentionState:
        """State of one chunk: key features (N, C, m), their log-scales (N, C, 1; −inf hides a key), v (N, C, e)."""
        log_scale = key_scale.amax(1, keepdim=True).clamp_(min=_NOTHING)
        weighted = (key_features * torch.exp(key_scale - log_scale)).transpose(1, 2)  # (N, m, C)
        return cls(weighted @ v, weighted.sum(-1, keepdim=True), log_scale)

    def merge(self, other: AttentionState) -> AttentionState:
        """The state of both sets of keys. Associative and commutative up to rounding."""
        log_scale = torch.maximum(self.log_scale, other.log_scale)
        mine, theirs = torch.exp(self.log_scale - log_scale), torch.exp(other.log_scale - log_scale)
        return AttentionState(
            mine * self.values + theirs * other.values,
            mine * self.normaliser + theirs * other.normaliser,
            log_scale,
        )
