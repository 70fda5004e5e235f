"""What the causal and the bidirectional scan share: chunks, and key features with padding hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longseq.attention.feature_maps import FeatureMap

# 128 positions balance the intra-chunk square against the pass over the (m, e) state for m = 256, e = 64.
CHUNK = 128


def chunks(length: int) -> list[slice]:
    """Consecutive slices of at most CHUNK positions that cover ``length``."""
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


@dataclass(frozen=True)
class Keys:
    """Features and log-scales of all keys, computed for one chunk at a time."""

    k: Tensor  # (N, L, d)
    hidden: Tensor | None  # (N, L) bool, True where a key is padding
    feature_map: FeatureMap

    def features(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """φ(k) (N, C, m) and log-scale (N, C, 1) of one chunk. A hidden key has φ(k) = 0 and log-scale −inf."""
        features, scale = self.feature_map.keys(self.k[:, chunk])
        if self.hidden is not None:
            hidden = self.hidden[:, chunk, None]
            features, scale = features.masked_fill_(hidden, 0.0), scale.masked_fill(hidden, -torch.inf)
        return features, scale

    def vjp(self, chunk: slice, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient (N, C, d) of one chunk of keys from that of its features."""
        return self.feature_map.keys_vjp(self.k[:, chunk], features, grad)


def inverse(den: Tensor) -> Tensor:
    """1 / den, and 0 for a query that sees no key at all: only there is a denominator zero."""
    return torch.where(den == 0, 0.0, den.reciprocal())
