"""A block's weights in the dtype of autocast, all in one launch; their gradients come back in one as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import is_traced


@contextmanager
def narrowed(maps: Sequence[nn.Linear]) -> Iterator[None]:
    """Inside, the linear maps have weights of autocast's dtype, and gradients reach those that they have outside.

    Autocast would cast each weight and each bias on its own, and each of their gradients.
    """
    places = [(module, name) for module in maps for name, x in module._parameters.items() if x is not None]
    wide = [module._parameters[name] for module, name in places]
    low = _Narrowed.apply(torch.get_autocast_dtype(wide[0].device.type), *wide)  # type: ignore[union-attr]
    try:
        for (module, name), x in zip(places, low, strict=True):
            module._parameters[name] = x
        yield
    finally:
        for (module, name), x in zip(places, wide, strict=True):
            module._parameters[name] = x


def narrows(maps: Sequence[nn.Linear]) -> bool:
    """Whether autocast would cast these: all are fp32, and lie here (ZeRO-3's do not)."""
    if is_traced() or not torch.is_autocast_enabled(maps[0].weight.device.type):
        return False
    return all(x.dtype == torch.float32 and not hasattr(x, "ds_id") for module in maps for x in module.parameters())


class _Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *wide: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_copied(wide, dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_copied([x for x in grads if x is not None], torch.float32))
        return None, *(None if x is None else next(found) for x in grads)


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
