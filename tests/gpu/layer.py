"""Operations that one layer of a model puts on a GPU in a step, forward and backward: PyTorch's and our kernels'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from tests.gpu.launches import Recorder
from torch.utils._python_dispatch import TorchDispatchMode

from longseq.attention import isolation
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

# Operations that launch nothing: views, and memory that is asked for.
_FREE = """
    view _unsafe_view transpose expand slice select unsqueeze squeeze as_strided detach alias t permute split chunk
    unbind
    empty empty_like new_empty narrow lift_fresh reshape _reshape_alias unfold split_with_sizes empty_strided mT set_
    new_empty_strided is_same_size resize_ diagonal view_as _local_scalar_dense
"""


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.free = frozenset(_FREE.split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.free and func.namespace != "longseq":  # ours are what they launch
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of_a_layer(recorder: Recorder, length: int) -> Counter[str]:
    """By operation; the difference of two models, of two layers and of one."""
    spec = PerformerSpec(vocabulary=32, dim=128, depth=2, heads=2, ffn_dim=128, causal=True, backend="triton")
    tokens = torch.zeros(1, length, dtype=torch.int64)
    model = PerformerLM(spec).train()
    both = model.blocks
    found: list[Counter[str]] = []
    for depth in (1, 2):
        model.blocks = both[:depth]
        recorder.launches.clear()
        found.append(_operations(lambda: model(tokens, targets=tokens)[0]))
        found[-1].update(launch.kernel for launch in recorder.launches)
    one, two = found
    two.subtract(one)
    return +two


def _operations(loss: Callable[[], torch.Tensor]) -> Counter[str]:
    looked = isolation.is_traced
    isolation.is_traced = lambda x=None: True  # no GPU is asked for NaN, and these tensors are played
    try:
        with torch.autocast("cpu", torch.bfloat16), _Count() as count:
            loss().backward()
    finally:
        isolation.is_traced = looked
    return count.operations
