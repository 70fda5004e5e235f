"""torch.compile of a model's blocks, in place: weights keep their names, and checkpoints stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from longseq.models.performer import PerformerLM

# Blocks share one program: with and without gradients, padding, documents, at one length and at any, are one each.
_PROGRAMS = 64


def compile_blocks(model: PerformerLM, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block when it is first called; one program serves all blocks, and all draws of the projections."""
    import torch._dynamo  # only now: it takes as long to import as everything else

    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a layer's number and draw are variables
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _PROGRAMS)
    # Dropout draws what it draws without a compiler, and recomputed blocks draw it again.
    options: dict[str, Any] = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    for block in model.blocks:
        block.compile(backend=backend, **options)


@contextmanager
def uncompiled(model: PerformerLM) -> Iterator[None]:
    """Inside, blocks run as they are written: for those who put something else into them."""
    compiled = [block._compiled_call_impl for block in model.blocks]
    try:
        for block in model.blocks:
            block._compiled_call_impl = None
        yield
    finally:
        for block, program in zip(model.blocks, compiled, strict=True):
            block._compiled_call_impl = program


def missing_compiler(device: str) -> str | None:
    """Why torch.compile cannot make programs for "cpu" or "cuda" here; None if it can."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "the package triton is not installed, or does not know this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, by where it is defined in this release
        return f"there is no C++ compiler ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None
