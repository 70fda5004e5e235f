"""The attention state: what linear attention must know of the keys and values it has seen.

State = Σ_j φ(k_j) [v_j, 1]ᵀ, kept as ``sums`` · exp(log_scale). Two states add after both are brought to the larger
log-scale; that one merge serves chunks on one device, packed documents, decoding, and ranks on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The log-scale of a state that has seen nothing. Finite, so that differences of two of them are 0 and not NaN.
NOTHING = -1e30


@dataclass(frozen=True)
class AttentionState:
    """Sum over keys, for each of N = batch · heads rows.

    Attributes:
        sums: (N, m, e + 1): Σ φ(k_j) [v_j, 1]ᵀ · exp(−log_scale). The last column is the normaliser, Σ φ(k_j).
        log_scale: (N, 1, 1): the largest log-scale of the keys so far, so no term exceeds its bounded features.
    """

    sums: Tensor
    log_scale: Tensor

    @classmethod
    def empty(cls, rows: int, features: int, value_dim: int, like: Tensor) -> AttentionState:
        """The neutral element of :meth:`merge`, in the device and dtype of ``like``."""
        return cls(like.new_zeros(rows, features, value_dim + 1), like.new_full((rows, 1, 1), NOTHING))

    @classmethod
    def of(cls, key_features: Tensor, key_scale: Tensor, values: Tensor) -> AttentionState:
        """State of one chunk.

        Args:
            key_features: φ(k), (N, C, m).
            key_scale: their log-scales, (N, C, 1); −inf leaves a key out.
            values: [v, 1], (N, C, e + 1).
        """
        log_scale = key_scale.amax(1, keepdim=True).clamp_(min=NOTHING)
        return cls(key_features.mT @ (values * torch.exp(key_scale - log_scale)), log_scale)

    def merge(self, other: AttentionState) -> AttentionState:
        """The state of both sets of keys. Associative and commutative up to rounding."""
        log_scale = torch.maximum(self.log_scale, other.log_scale)
        mine, theirs = torch.exp(self.log_scale - log_scale), torch.exp(other.log_scale - log_scale)
        return AttentionState(torch.addcmul(mine * self.sums, theirs, other.sums), log_scale)

    def to(self, dtype: torch.dtype) -> AttentionState:
        """The same in another dtype."""
        return AttentionState(self.sums.to(dtype), self.log_scale.to(dtype))

    def double(self) -> AttentionState:
        """In float64, which states of many tiles are added up in."""
        return self.to(torch.float64)

    def faded(self, log_factor: Tensor | None) -> AttentionState:
        """The same keys, every weight multiplied by exp(``log_factor``), (N, 1, 1), or by nothing."""
        return self if log_factor is None else AttentionState(self.sums, self.log_scale + log_factor)


def widened(x: Tensor) -> Tensor:
    """x in the dtype that sums are formed in: fp32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def with_ones(v: Tensor) -> Tensor:
    """[v, 1]: (..., e + 1). The column of ones makes the denominator one more column of every product."""
    return torch.cat((v, v.new_ones(*v.shape[:-1], 1)), dim=-1)


def inverse(den: Tensor, positive: bool) -> Tensor:
    """1 / den, and 0 where a query sees no key at all.

    Only there is the denominator of ``positive`` features zero. Those of signed features may cancel down to rounding:
    such a query gets zeros too, instead of an arbitrary multiple of noise.
    """
    least = torch.finfo(den.dtype).tiny ** 0.75 if positive else 1e-6
    return torch.where(den.abs() < least, 0.0, den.reciprocal())
