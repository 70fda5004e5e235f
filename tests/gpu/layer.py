"""Operations that one layer of a model puts on a GPU in a step, forward and backward: PyTorch's and our kernels'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.gpu.launches import Recorder
from torch.utils._python_dispatch import TorchDispatchMode

from longseq.attention import fused, isolation
from longseq.models.performer import PerformerLM
from longseq.models.spec import PerformerSpec

# Operations that launch nothing: views, and memory that is asked for.
_FREE = """
    view _unsafe_view transpose expand slice select unsqueeze squeeze as_strided detach alias t permute split chunk
    unbind
    empty empty_like new_empty narrow lift_fresh reshape _reshape_alias unfold split_with_sizes empty_strided mT set_
    new_empty_strided is_same_size resize_ diagonal view_as _local_scalar_dense promote_types
    bernoulli_ div_
"""  # the last two: with the product they are a CPU's dropout, which is one operation on a GPU


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.free = frozenset(_FREE.split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # what is in it
            if func.namespace == "longseq":
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
            done = func.decompose(*args, **(kwargs or {}))
        if done is not NotImplemented:
            return done
        name = func.overloadpacket.__name__
        if name not in self.free:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Way:
    """How a model is trained, as far as the launches of a layer depend on it."""

    weights: torch.dtype = torch.bfloat16  # bf16: DeepSpeed's; fp32: under autocast, as DDP's and of one process
    checkpoints: bool = False  # blocks are computed again in the backward pass
    dropout: float = 0.0
    tile: int = 0

    @property
    def autocast(self) -> bool:
        return self.weights == torch.float32


def launches_of_a_layer(recorder: Recorder, length: int, way: Way) -> Counter[str]:
    """By operation; the difference of two models, of two layers and of one."""
    spec = PerformerSpec(
        vocabulary=32,
        dim=64,
        depth=2,
        heads=2,
        ffn_dim=64,
        causal=True,
        backend="triton",
        dropout=way.dropout,
        activation_checkpointing=way.checkpoints,
        sequence_tile=way.tile,
    )
    tokens = torch.zeros(1, length, dtype=torch.int64)
    model = PerformerLM(spec).train().to(way.weights)
    both = model.blocks
    found: list[Counter[str]] = []
    for depth in (1, 2):
        model.blocks = both[:depth]
        model.zero_grad()  # else the second's gradients are added to the first's
        recorder.launches.clear()
        found.append(_operations(lambda: model(tokens, targets=tokens)[0], way.autocast))
        found[-1].update(launch.kernel for launch in recorder.launches)
    one, two = found
    two.subtract(one)
    return +two


def _operations(loss: Callable[[], torch.Tensor], autocast: bool) -> Counter[str]:
    looked, fused.ELSEWHERE = isolation.is_traced, True
    isolation.is_traced = lambda x=None: True  # no GPU is asked for NaN, and these tensors are played
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), _Count() as count:
            loss().backward()
    finally:
        isolation.is_traced, fused.ELSEWHERE = looked, False
    return count.operations
