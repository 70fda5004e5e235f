"""Dtypes and seeds, for all ways into the package."""

from __future__ import annotations

import hashlib
from typing import SupportsIndex

import torch
from torch import Tensor

from longseq.attention.options import integer

HALF = (torch.float16, torch.bfloat16)
FLOATING = (*HALF, torch.float32, torch.float64)


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
