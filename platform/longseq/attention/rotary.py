"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of the rotary angles of integer positions (..., L): (2, ..., L, D/2) fp32.

    The angles are computed in float64: in fp32 they are off by 0.02 at a million positions.
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[..., None].double() * frequencies
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys to their positions, in fp32.

    Args:
        x: (B, H, L, D), D even.
        table: (2, L, D/2) from :func:`rotary_table`, or (2, B, 1, L, D/2) where each row has its own positions.

    Returns:
        Rotated tensor, same shape and dtype. Norms are unchanged.
    """
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
