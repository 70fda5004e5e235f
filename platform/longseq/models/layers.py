"""The parts of a Performer: rotary positions, attention, MLP, block.

Axes in names and comments: B batch, L length, H heads, D head_dim, E = H · D the model's width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention import exact_attention, favor_attention
from longseq.models.spec import PerformerSpec


def rotate(x_BHLD: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout, computed in fp32.

    Args:
        x_BHLD: queries or keys, head_dim even.
        positions: (L,) integer positions.
        base: the longest wavelength is 2π · base.

    Returns:
        Rotated tensor, same shape and dtype. Norms are unchanged.
    """
    half = x_BHLD.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x_BHLD.device, dtype=torch.float32) / half)
    angles = positions[:, None].float() * frequencies  # (L, D/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x_BHLD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x_BHLD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; FAVOR+ or exact softmax over the same weights.

    ``draw`` selects the projection matrix of the random features. It is set from the optimiser step (see
    ``PerformerLM.set_step``), never from a random generator, so accumulation, recompute and ranks agree.
    """

    def __init__(self, spec: PerformerSpec, layer: int):
        super().__init__()
        self.spec, self.layer, self.draw = spec, layer, 0
        self.qkv = nn.Linear(spec.dim, 3 * spec.dim, bias=False)
        self.out = nn.Linear(spec.dim, spec.dim, bias=False)
        if spec.qk_norm:
            # With unit queries and keys, qᵀk/√d is τ · cosine. The random features' variance grows with e^{4τ}:
            # τ = 2 is sharp enough to select and still cheap to approximate; each head learns its own.
            self.log_temperature = nn.Parameter(torch.full((spec.heads, 1, 1), math.log(2.0)))

    def forward(self, x_BLE: Tensor, padding: Tensor | None) -> Tensor:
        """Self-attention over x (B, L, E). padding: (B, L) bool, True where a token is real, or None."""
        spec = self.spec
        q, k, v = (t.unflatten(-1, (spec.heads, -1)).transpose(1, 2) for t in self.qkv(x_BLE).chunk(3, dim=-1))
        if spec.qk_norm:
            scale = torch.exp(0.5 * self.log_temperature) * spec.head_dim**0.25
            q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) * scale for t in (q, k))
        positions = torch.arange(x_BLE.shape[1], device=x_BLE.device)
        q, k = rotate(q, positions).to(v.dtype), rotate(k, positions).to(v.dtype)
        if spec.attention == "exact":
            mixed = exact_attention(q, k, v, causal=spec.causal, key_padding=padding)
        else:
            mixed = favor_attention(
                q,
                k,
                v,
                causal=spec.causal,
                kernel=spec.kernel,
                features=spec.features,
                key_padding=padding,
                seed=spec.seed,
                layer=self.layer,
                draw=self.draw,
            )
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, spec: PerformerSpec, layer: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(spec.dim)
        self.attention = Attention(spec, layer)
        self.mlp_norm = nn.LayerNorm(spec.dim)
        self.mlp = nn.Sequential(nn.Linear(spec.dim, spec.ffn_dim), nn.GELU(), nn.Linear(spec.ffn_dim, spec.dim))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BLE: Tensor, padding: Tensor | None) -> Tensor:
        x_BLE = x_BLE + self.dropout(self.attention(self.attention_norm(x_BLE), padding))
        return x_BLE + self.dropout(self.mlp(self.mlp_norm(x_BLE)))
