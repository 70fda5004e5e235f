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


def rotary_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of the rotary angles of integer positions (L,): (2, L, D/2) fp32.

    The angles are computed in float64: in fp32 they are off by 0.02 at a million positions.
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[:, None].double() * frequencies
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x_BHLD: Tensor, table: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout, computed in fp32.

    Args:
        x_BHLD: queries or keys, head_dim even.
        table: (2, L, D/2) from :func:`rotary_table`.

    Returns:
        Rotated tensor, same shape and dtype. Norms are unchanged.
    """
    cos, sin = table
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

    def forward(self, x_BLE: Tensor, padding: Tensor | None, rotary: Tensor) -> Tensor:
        """Self-attention over x (B, L, E).

        padding: (B, L) bool, True where a token is real, or None; rotary: (2, L, D/2) from :func:`rotary_table`.
        """
        spec = self.spec
        q, k, v = (t.unflatten(-1, (spec.heads, -1)).transpose(1, 2) for t in self.qkv(x_BLE).chunk(3, dim=-1))
        if spec.qk_norm:
            scale = torch.exp(0.5 * self.log_temperature) * spec.head_dim**0.25
            q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) * scale for t in (q, k))
        q, k = rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype)
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

    def forward(self, x_BLE: Tensor, padding: Tensor | None, rotary: Tensor) -> Tensor:
        x_BLE = x_BLE + self.dropout(self.attention(self.attention_norm(x_BLE), padding, rotary))
        return x_BLE + self.dropout(self.mlp(self.mlp_norm(x_BLE)))
