"""Backward passes that are differentiated once: what all autograd functions here have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Saved = tuple[Any, ...]  # what was given to save_for_backward: tensors, and None


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward pass ``backward(ctx, saved, *grads)`` as autograd calls it, without ``saved``.

    - Saved tensors are unpacked once: checkpoints and offloading have hooks that may fire only once.
    - Autocast is off: torch restores the forward pass's state, which has it off as well, in the forward pass only.
    - The gradients are constants. With ``create_graph=True`` they hang on a node that refuses to be differentiated, on
      the way to all that they depend on: the incoming gradients, the saved tensors and ``ctx.parameters``, if there
      are any. A function that does not save one of its inputs saves its :func:`origin`, unless it is linear in it.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Gradients:
        saved = ctx.saved_tensors
        device = next((x.device.type for x in (*saved, *grads) if x is not None), "cpu")
        with torch.no_grad(), torch.autocast(device, enabled=False):
            found = backward(ctx, saved, *grads)
        if torch.is_grad_enabled():
            return _final(found, (*grads, *saved, *getattr(ctx, "parameters", ())), type(ctx).__name__)
        return found

    return once


def origin(x: Tensor) -> Tensor:
    """Nothing of x, but what x depends on: a tensor without elements, to be saved where x itself would be a waste."""
    with torch.enable_grad():
        return x[:0].clone()


def _final(gradients: Gradients, depend_on: tuple[Tensor | None, ...], name: str) -> Gradients:
    origins = [x for x in depend_on if x is not None and x.requires_grad]
    given = [x for x in gradients if x is not None]
    if not origins or not given:
        return gradients
    final = iter(_Final.apply(name, len(given), *given, *origins))
    return tuple(None if x is None else next(final) for x in gradients)


class _Final(torch.autograd.Function):
    """Gradients as they are. Zeros for their own derivatives would be wrong without a word."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Gradients:
        raise RuntimeError(
            "longseq's attention and loss have first derivatives only: a gradient taken with create_graph=True cannot "
            f"be differentiated again, as a Hessian or a gradient penalty does (here that of {ctx.name})"
        )
