"""Gaussian projection matrices for random features: a pure function of (seed, layer, draw).

Nothing here is kept as state: every rank, every recompute and every resumed run derives the same matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, SupportsIndex, get_args

import numpy as np
import torch
from torch import Tensor

from longseq.attention.arguments import hashed
from longseq.attention.operators import LIBRARY, is_traced
from longseq.attention.options import integer

Rows = Literal["chi", "sqrt_d"]
Draw = Callable[..., Tensor]


class CachedDraw(Protocol):
    def __call__(
        self,
        features: SupportsIndex,
        head_dim: SupportsIndex,
        *,
        seed: SupportsIndex = 0,
        layer: SupportsIndex = 0,
        draw: SupportsIndex = 0,
        orthogonal: bool = True,
        rows: Rows = "chi",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor: ...

    def cache_clear(self) -> None: ...


_BLOCKS = 16  # rotated at a time, so that they stay in a core's cache


def _cached(draw: Draw) -> CachedDraw:
    """``draw`` with a cache behind the check of its integers: 3.0 equals 3, and would find what 3 has left there."""

    def by_index(function: Draw) -> Draw:
        @functools.wraps(draw)
        def checked(features: SupportsIndex, head_dim: SupportsIndex, **options: Any) -> Tensor:
            traced = is_traced()
            for name in options.keys() & {"seed", "layer", "draw"}:
                if not (traced and name == "draw" and isinstance(options[name], Tensor)):  # read when the program runs
                    options[name] = integer(name, options[name])
            sizes = integer("features", features, least=1), integer("head_dim", head_dim, least=1)
            return _as_operator(*sizes, **options) if traced else function(*sizes, **options)

        return checked

    cached = functools.lru_cache(maxsize=512)(draw)
    door: Any = by_index(cached)
    door.__wrapped__, door.cache_clear = by_index(draw), cached.cache_clear
    made: CachedDraw = door
    return made


@_cached
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
        device, dtype: where the matrix is wanted. It is computed in float64 on the CPU first, by operations of one
            order, so that it is the same on all devices, for any number of threads.

    Returns:
        (features, head_dim). The tensor is cached and shared: treat it as read-only.

    Raises:
        TypeError: for a number that is not an integer; NumPy's and a tensor of one integer are.
        ValueError: if ``features`` or ``head_dim`` is not positive, another number negative or above 2^63 − 1, or for
            an unknown ``rows``.
    """
    if rows not in get_args(Rows):
        raise ValueError(f"unknown rows {rows!r}; the row lengths are {', '.join(get_args(Rows))}")
    # A matrix first needed during validation must not become an inference tensor: training would choke on it later.
    with torch.inference_mode(False), torch.no_grad():
        rng = torch.Generator("cpu").manual_seed(hashed(8, "projection", seed, layer, draw) >> 1)
        if orthogonal:
            shape = head_dim, head_dim
            blocks = [
                torch.randn(shape, generator=rng, device="cpu", dtype=torch.float64)
                for _ in range(-(-features // head_dim))
            ]
            lengths = torch.randn(features, head_dim, generator=rng, device="cpu", dtype=torch.float64).norm(
                dim=1, keepdim=True
            )
            rotations = [_rotations(blocks[at : at + _BLOCKS]) for at in range(0, len(blocks), _BLOCKS)]
            matrix = torch.cat(rotations).flatten(0, 1)[:features] * lengths
        else:
            matrix = torch.randn(features, head_dim, generator=rng, device="cpu", dtype=torch.float64)
        if rows == "sqrt_d":
            matrix = matrix * (head_dim**0.5 / matrix.norm(dim=1, keepdim=True))
        made: Tensor = matrix.to(device=device, dtype=dtype)
        return made


def _as_operator(
    features: int,
    head_dim: int,
    seed: int = 0,
    layer: int = 0,
    draw: int | Tensor = 0,
    orthogonal: bool = True,
    rows: Rows = "chi",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """In a traced program: drawn when it runs, for the draw of that step."""
    if not isinstance(draw, Tensor):
        draw = torch.full((), draw, dtype=torch.int64, device="cpu")
    numbers = features, head_dim, seed, layer, draw, orthogonal, rows
    matrix: Tensor = torch.ops.longseq.projection(*numbers, torch.device(device), dtype)
    return matrix


def _projection(
    features: int,
    head_dim: int,
    seed: int,
    layer: int,
    draw: Tensor,
    orthogonal: bool,
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    options: dict[str, Any] = {"orthogonal": orthogonal, "rows": rows, "device": device, "dtype": dtype}
    # A compiler may write into what an operator gives.
    return projection_matrix(features, head_dim, seed=seed, layer=layer, draw=draw, **options).clone()


def _projection_shape(features: int, head_dim: int, *others: Any) -> Tensor:
    *_, device, dtype = others
    return torch.empty(features, head_dim, device=device, dtype=dtype)


LIBRARY.define(
    "projection(SymInt features, SymInt head_dim, SymInt seed, SymInt layer, Tensor draw, bool orthogonal, str rows, "
    "Device device, ScalarType dtype) -> Tensor"
)
LIBRARY.impl("projection", _projection, "CompositeExplicitAutograd")
torch.library.register_fake("longseq::projection", _projection_shape, lib=LIBRARY)


def _rotations(blocks: list[Tensor]) -> Tensor:
    """The Q of each Gaussian block's QR with a positive diagonal of R, Haar-distributed (Mezzadri 2007, section 5).

    By Gram-Schmidt's modified method, twice: LAPACK's answer depends on the number of threads in the last bits. NumPy's
    sums and products of elements have one order.
    """
    q = torch.stack(blocks).numpy()
    for _ in range(2):  # the second time for the rounding of the first
        for at in range(q.shape[2]):
            column, later = q[:, :, at : at + 1], q[:, :, at + 1 :]
            column /= np.sqrt((column * column).sum(1, keepdims=True))
            later -= column * (column * later).sum(1, keepdims=True)
    return torch.from_numpy(q)
