"""What attention may be asked for: one check of each kind of argument, for all ways into the package."""

from __future__ import annotations

import hashlib
import itertools
import operator
from typing import SupportsIndex

import torch
from torch import Tensor

LARGEST = 2**63 - 1
HALF = (torch.float16, torch.bfloat16)
FLOATING = (*HALF, torch.float32, torch.float64)


def integer(name: str, value: SupportsIndex, least: int = 0) -> int:
    """A plain int of whatever is one: Python's, NumPy's, or a tensor of one integer. 3.0 and True are none.

    Raises:
        TypeError: for anything else.
        ValueError: below ``least`` or above 2^63 − 1.
    """
    if type(value) is not int:
        is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
        try:
            number = None if is_bool else operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None:
            raise TypeError(f"{name} must be an integer, got {value!r}, a {type(value).__name__}")
        value = int(number)
    if not least <= value <= LARGEST:
        raise ValueError(f"{name} must be an integer from {least} to 2^63 - 1, got {value}")
    return value


def floating(**named: Tensor | None) -> None:
    """Refuse tensors that are not real floating point, by name."""
    for name, x in named.items():
        if x is not None and x.dtype not in FLOATING:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise TypeError(f"{name} must be a tensor of {kinds}; got {str(x.dtype).removeprefix('torch.')}")


def dtypes(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What q, k and v are multiplied in, and what sums are formed in.

    The second is fp32, or float64 for float64 values. The first is the same, unless all three are bf16 or all fp16.
    """
    summed = torch.float64 if v.dtype == torch.float64 else torch.float32
    return (q.dtype if q.dtype in HALF and q.dtype == k.dtype == v.dtype else summed), summed


def whole(x: Tensor) -> bool:
    """Whether its elements are integers."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def hashed(size: int, *what: SupportsIndex | str) -> int:
    """An integer of ``size`` bytes: neighbouring seeds, layers and steps give unrelated ones.

    It depends on the values of ``what`` alone: an integer of NumPy gives what Python's gives.
    """
    plain = tuple(x if isinstance(x, str) else integer("what a seed is made of", x) for x in what)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=size).digest(), "big")


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: SupportsIndex = 0,
    features: SupportsIndex = 0,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    far_share: Tensor | None = None,
    decay: Tensor | None = None,
) -> Tensor | None:
    """Refuse what does not fit together; the documents as segments, however they were given."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must be (batch, heads, length, dim), got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"batch, heads, key length or head_dim differ: {shapes}")
    if not q.shape[-1]:
        raise ValueError(f"q and k need a head_dim of at least 1: {shapes}")
    floating(q=q, k=k, v=v, far_share=far_share, decay=decay)
    window, features = integer("window", window), integer("features", features)
    if far_share is not None and not window:
        raise ValueError("far_share weighs the keys beyond a window: it needs window=1 or more, or to be None")
    positions_matter = causal or window or segments is not None or cu_seqlens is not None or decay is not None
    if positions_matter and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal, windowed, packed or decaying attention needs as many queries as keys: {shapes}")
    batch, heads, length = k.shape[:3]
    if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != (batch, length)):
        raise ValueError(
            f"key_padding must be bool of shape {(batch, length)}, True where a key is real; "
            f"got {key_padding.dtype} {tuple(key_padding.shape)}"
        )
    for name, value in (("far_share", far_share), ("decay", decay)):
        if value is not None and value.shape != (heads,):
            raise ValueError(f"{name} must have one number a head, shape {(heads,)}; got {tuple(value.shape)}")
    if cu_seqlens is not None:
        if segments is not None:
            raise ValueError("give segments or cu_seqlens, not both")
        segments = _segments(cu_seqlens, batch, length)
    if segments is not None and (segments.shape != (batch, length) or not whole(segments)):
        raise ValueError(
            f"segments must be integers of shape {(batch, length)}; got {segments.dtype} {tuple(segments.shape)}"
        )
    return segments


def _segments(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    borders = cu_seqlens.tolist() if cu_seqlens.ndim == 1 and whole(cu_seqlens) else []
    if batch != 1 or borders[:1] != [0] or borders[-1] != length or any(a > b for a, b in itertools.pairwise(borders)):
        raise ValueError(
            f"cu_seqlens must be integers that rise from 0 to the length {length} over a batch of one; "
            f"got {borders[:8]}{' …' if len(borders) > 8 else ''} for a batch of {batch}"
        )
    sizes = torch.as_tensor(borders, device=cu_seqlens.device).diff()
    return torch.repeat_interleave(torch.arange(len(sizes), device=cu_seqlens.device), sizes)[None]
