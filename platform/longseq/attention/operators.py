"""Attention's operations as operators of PyTorch: ``torch.ops.longseq.scan``, ``.window`` and ``.bidirectional``.

An operator is opaque to whoever traces it (torch.compile, torch.export, FakeTensor): they see its schema and the shapes
that it gives. :mod:`longseq.attention.operations` says what they compute. First derivatives only: see
:mod:`longseq.attention.first_order`. ``torch.func.vmap`` is refused: what it would map over belongs into the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

LIBRARY = torch.library.Library("longseq", "FRAGMENT")


def is_traced(x: Tensor | None = None) -> bool:
    """Whether there is no data to look at: a compiler reads along, or tensors are fake (as ``x`` is)."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None or isinstance(x, FakeTensor)


def operator(
    schema: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    with_gradients: Callable[[Any, tuple[Any, ...]], Any] | None = None,
) -> Any:
    """Register ``compute`` as an operator, ``shapes`` for tensors without data, and what calls the operator with
    arguments of which one needs a gradient."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.longseq, name).default
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, compute, device)
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")
        LIBRARY.impl(name, _uncast(operator, torch._C.DispatchKeySet(key)), f"Autocast{device}")
    torch.library.register_fake(f"longseq::{name}", shapes, lib=LIBRARY)
    torch.library.register_vmap(f"longseq::{name}", _refuse_vmap, lib=LIBRARY)
    if with_gradients is not None:

        def differentiable(*args: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return with_gradients(operator, args)
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
