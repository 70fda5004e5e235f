"""Gaussian projection matrices for random features: a pure function of (seed, layer, draw).

Nothing here is kept as state: every rank, every recompute and every resumed run derives the same matrix.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Rows = Literal["chi", "sqrt_d"]


@lru_cache(maxsize=512)
def projection_matrix(
    features: int,
    head_dim: int,
    *,
    seed: int = 0,
    layer: int = 0,
    draw: int = 0,
    orthogonal: bool = True,
    rows: Rows = "chi",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw ω, one row a feature, each row marginally N(0, I), or uniform on a sphere.

    With ``orthogonal`` the rows come in blocks of ``head_dim`` mutually orthogonal ones (Choromanski et al. 2020,
    section 2.4): directions from a Haar-distributed rotation; the last block is truncated. Blocks are independent of
    each other. Without, all rows are independent.

    Args:
        features: number of rows, m.
        head_dim: number of columns, d.
        seed, layer, draw: what the matrix is a function of. ``draw`` counts the redraws.
        orthogonal: block-orthogonal rows instead of independent ones.
        rows: lengths of the rows: "chi" (independent χ(head_dim) variables, which makes rows Gaussian) or "sqrt_d"
            (all √head_dim, the regularised softmax kernel).
        device, dtype: where the matrix is wanted. It is computed in float64 on the CPU first, so that it is the same
            on all devices of a machine; other processors may round the rotation differently in the last bits.

    Returns:
        (features, head_dim). The tensor is cached and shared: treat it as read-only.

    Raises:
        ValueError: if ``features`` or ``head_dim`` is not positive, or for an unknown ``rows``.
    """
    if features < 1 or head_dim < 1:
        raise ValueError(f"a projection needs positive sizes, got features={features} and head_dim={head_dim}")
    if rows not in get_args(Rows):
        raise ValueError(f"unknown rows {rows!r}; the row lengths are {', '.join(get_args(Rows))}")
    # A matrix first needed during validation must not become an inference tensor: training would choke on it later.
    with torch.inference_mode(False), torch.no_grad():
        rng = torch.Generator("cpu").manual_seed(_seed_of("projection", seed, layer, draw))
        if orthogonal:
            blocks = [_random_rotation(head_dim, rng) for _ in range(-(-features // head_dim))]
            lengths = torch.randn(features, head_dim, generator=rng, device="cpu", dtype=torch.float64).norm(
                dim=1, keepdim=True
            )
            matrix = torch.cat(blocks)[:features] * lengths
        else:
            matrix = torch.randn(features, head_dim, generator=rng, device="cpu", dtype=torch.float64)
        if rows == "sqrt_d":
            matrix = matrix * (head_dim**0.5 / matrix.norm(dim=1, keepdim=True))
        return matrix.to(device=device, dtype=dtype)


def _random_rotation(size: int, rng: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=rng, device="cpu", dtype=torch.float64))
    # Without the signs of R's diagonal, Q is not uniform over rotations (Mezzadri 2007, section 5).
    return q * r.diagonal().sign()


def _seed_of(*what: int | str) -> int:
    """63 bits from a hash of ``what``: neighbouring seeds, layers and draws give unrelated streams."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
