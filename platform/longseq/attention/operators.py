"""Attention's operations as operators of PyTorch: ``torch.ops.longseq.scan``, ``.window`` and ``.bidirectional``.

An operator is opaque to whoever traces it (torch.compile, torch.export, FakeTensor): they see its schema and the shapes
that it gives. Each operation has one autograd function, for all backends; a backend computes and knows of no autograd.
A feature map goes in as its parts (:meth:`longseq.attention.feature_maps.FeatureMap.parts`), a backend by name, and is
chosen inside.

``kept`` is what a forward pass leaves for its backward pass, a backend's own business. First derivatives only: see
:mod:`longseq.attention.first_order`. ``torch.func.vmap`` is refused: what it would map over belongs into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

LIBRARY = torch.library.Library("longseq", "FRAGMENT")

# Parts of the operators' schemas: rows (N, L, ·), and a feature map.
ROWS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? hidden, Tensor? runs"
MAP = "str kind, Tensor weight, Tensor? shift, float log_constant"


def is_traced(x: Tensor | None = None) -> bool:
    """Whether there is no data to look at: a compiler reads along, or tensors are fake (as ``x`` is)."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None or isinstance(x, FakeTensor)


class Differentiable(Protocol):
    """An autograd function that calls the operator."""

    @staticmethod
    def apply(*args: Any) -> Any:
        """The operator's results, its lists taken apart."""

    @staticmethod
    def outputs(made: Any) -> Any:
        """Them as the schema has it."""


def operator(
    schema: str, compute: Callable[..., Any], shapes: Callable[..., Any], function: type[Differentiable] | None = None
) -> Any:
    """Register ``compute`` as an operator, ``shapes`` for tensors without data, and its autograd ``function``."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.longseq, name).default
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, compute, device)
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")
        LIBRARY.impl(name, _uncast(operator, torch._C.DispatchKeySet(key)), f"Autocast{device}")
    torch.library.register_fake(f"longseq::{name}", shapes, lib=LIBRARY)
    torch.library.register_vmap(f"longseq::{name}", _refuse_vmap, lib=LIBRARY)
    if function is not None:

        def differentiable(*args: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return function.outputs(function.apply(*args))
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        LIBRARY.impl(name, differentiable, "Autograd")
    return operator


def _uncast(operator: Any, keys: torch._C.DispatchKeySet) -> Callable[..., Any]:
    """Autocast would round sums and exponents: operators say themselves what is rounded."""

    def without_autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*args)

    return without_autocast


def _refuse_vmap(*_: Any) -> NoReturn:
    raise RuntimeError(
        "longseq's attention is not for torch.func.vmap: it takes (batch, heads, length, dim), so let what vmap would "
        "map over be part of the batch"
    )


def packed(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """A list that an operator may return: it holds tensors only."""
    return [like.new_empty(0) if x is None else x for x in tensors]


def unpacked(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x.shape == (0,) else x for x in tensors]


def summed(x: Tensor, *shape: int) -> Tensor:
    """Empty, in the dtype of sums."""
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
