"""A block's weights in the dtype of autocast, all in one launch; their gradients come back in one as well.

On GPUs: a CPU launches nothing, and autocast itself is a little quicker there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.attention import fused
from longseq.attention.first_order import Saved, first_order
from longseq.attention.operators import is_traced


class _Inside(threading.local):
    weights: Mapping[nn.Module, Sequence[Tensor]] = {}  # weight, and bias if there is one


_inside = _Inside()


class Linear(nn.Linear):
    """A linear map that inside :func:`narrowed` computes with copies of its weights.

    Its own stay in their place: whoever copies, saves or uses the module meanwhile, in another thread even, finds them.
    """

    def forward(self, x: Tensor) -> Tensor:
        low = None if torch.compiler.is_compiling() else _inside.weights.get(self)
        return super().forward(x) if low is None else F.linear(x, *low)


@contextmanager
def narrowed(maps: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, those of the maps whose weights autocast would cast have them in its dtype; their own get the gradients.

    Autocast would cast each weight and each bias on its own, and each of their gradients.
    """
    cast = [module for module in maps if isinstance(module, Linear) and _plain(module)]
    kind = cast[0].weight.device.type if cast else "cpu"
    if not cast or is_traced() or not torch.is_autocast_enabled(kind) or not (kind == "cuda" or fused.ELSEWHERE):
        yield
        return
    wide = [[x for x in (module.weight, module.bias) if x is not None] for module in cast]
    low = iter(_Narrowed.apply(torch.get_autocast_dtype(kind), *(x for own in wide for x in own)))
    before = _inside.weights
    _inside.weights = {**before, **{m: [next(low) for _ in own] for m, own in zip(cast, wide, strict=True)}}
    try:
        yield
    finally:
        _inside.weights = before


def _plain(module: Linear) -> bool:
    """Whether its weights are fp32, lie here (ZeRO-3's do not), and are not made of others when they are read."""
    own = module._parameters
    present = [x for x in own.values() if x is not None]
    return own.keys() == {"weight", "bias"} and all(
        x.dtype == torch.float32 and not hasattr(x, "ds_id") for x in present
    )


class _Narrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *wide: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        low = tuple(_copied(wide, dtype))
        # Else all weights of a block would have gradients where a few of them learn.
        ctx.mark_non_differentiable(*(x for x, wanted in zip(low, ctx.needs_input_grad[1:], strict=True) if not wanted))
        return low

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
