"""Operations that one layer of a model puts on a GPU in a step, forward and backward: PyTorch's and our kernels'.

    python tests/gpu/layer.py [WAY ...]
    python tests/gpu/layer.py --arch 90    what its small kernels spill

The model's own code runs, on CPU tensors, and our kernels are counted instead of started: results are whatever was in
memory. Kernels of the loss, the embedding and the optimiser are no layer's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from longseq.attention import fused, isolation, rotary_table
from longseq.attention.backends.triton import launch as triton_launch
from longseq.attention.backends.triton import parts
from longseq.attention.heads import split_heads
from longseq.models.norm import Norm
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

    length: int = 8192
    weights: torch.dtype = torch.bfloat16  # bf16: DeepSpeed's; fp32: under autocast, as DDP's and of one process
    checkpoints: bool = False  # blocks are computed again in the backward pass
    dropout: float = 0.0
    qk_norm: bool = False
    causal: bool = True
    window: int = 0
    learned: bool = False  # a share and a decay a head
    gate: bool = False
    padding: bool = False

    @property
    def autocast(self) -> bool:
        return self.weights == torch.float32


def launches_of_a_layer(way: Way) -> Counter[str]:
    """By operation; the difference of two models, of two layers and of one."""
    spec = PerformerSpec(
        vocabulary=32,
        dim=64,
        depth=2,
        heads=2,
        ffn_dim=64,
        causal=way.causal,
        window=way.window,
        learned_share=way.learned and way.window > 0,
        learned_decay=way.learned,
        forget_gate=way.gate,
        backend="triton",
        dropout=way.dropout,
        qk_norm=way.qk_norm,
        activation_checkpointing=way.checkpoints,
    )
    tokens = torch.zeros(1, way.length, dtype=torch.int64)
    padding = torch.ones_like(tokens, dtype=torch.bool) if way.padding else None
    model = PerformerLM(spec).train().to(way.weights)
    both = model.blocks
    found: list[Counter[str]] = []
    for depth in (1, 2):
        model.blocks = both[:depth]
        model.zero_grad()  # else the second's gradients are added to the first's
        found.append(_operations(lambda: model(tokens, padding, targets=tokens)[0], way.autocast))
    one, two = found
    two.subtract(one)
    return +two


def _operations(loss: Callable[[], torch.Tensor], autocast: bool) -> Counter[str]:
    with _counted() as kernels, torch.autocast("cpu", torch.bfloat16, enabled=autocast), _Count() as count:
        loss().backward()
    return count.operations + kernels


@contextlib.contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Kernels of ours that would be started, by name; and all that is asked whether this is a GPU says so."""
    kernels: Counter[str] = Counter()

    def run(function: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernels[function.fn.__name__] += 1

    def launcher(function: JITFunction, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: function.run(*args, grid=grid, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(JITFunction, "__getitem__", launcher)
        patch.setattr(triton_launch, "unsupported", lambda feature_map, rows: None)
        patch.setattr(fused, "ELSEWHERE", True)
        patch.setattr(isolation, "is_traced", lambda x=None: True)  # no GPU is asked for NaN
        yield kernels


FP32 = torch.float32
WAYS = {
    "autocast": Way(weights=FP32),
    "autocast, dropout": Way(weights=FP32, dropout=0.1),
    "autocast, checkpoints": Way(weights=FP32, checkpoints=True),
    "autocast, qk_norm": Way(weights=FP32, qk_norm=True),
    "bf16": Way(),
    "bf16, qk_norm": Way(qk_norm=True),
    "bf16, dropout": Way(dropout=0.1),
    "bf16, checkpoints": Way(checkpoints=True),
    "bf16, window": Way(window=64),
    "autocast, window": Way(weights=FP32, window=64),
    "bf16, window, learned": Way(window=64, learned=True),
    "autocast, window, learned": Way(weights=FP32, window=64, learned=True),
    "bf16, learned": Way(learned=True),
    "bf16, gate": Way(gate=True),
    "bf16, window, gate": Way(window=64, gate=True),
    "bf16, masked": Way(causal=False, padding=True),
    "autocast, masked": Way(weights=FP32, causal=False, padding=True),
    "autocast, 1M": Way(length=2**20, weights=FP32, checkpoints=True),
    "bf16, 1M": Way(length=2**20, checkpoints=True),
    "bf16, 1M, window": Way(length=2**20, checkpoints=True, window=64),
}


def stacks(arch: int) -> dict[str, int]:
    """Bytes of a thread's stack, where registers spill to, of the layer's kernels but attention's; the most of each."""
    from tests.gpu.launches import Recorder
    from tests.gpu.offline import _resources

    fused.ELSEWHERE = True
    found: dict[str, int] = {}
    with Recorder(arch).installed() as recorder, torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            for width in (512, 2048, 8192):
                x, y = (torch.zeros(1, 64, width, dtype=of, requires_grad=True) for of in (dtype, torch.bfloat16))
                outputs = Norm(width, 1e-5).to(dtype)(x, y)
                torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
            for head_dim in (32, 64, 128):
                qkv = torch.zeros(1, 64, 6 * head_dim, dtype=dtype, requires_grad=True)
                for temperature in (None, torch.zeros(2, 1, 1, dtype=dtype, requires_grad=True)):
                    outputs = split_heads(qkv, 2, rotary_table(torch.arange(64), head_dim), temperature)
                    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
            of_heads = torch.zeros(2, dtype=dtype)
            rates = parts.rates(of_heads, 1, log=True)
            both = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float64)
            parts.add_learned(of_heads, rates, both, of_heads, torch.zeros(1, 2, 4), log=True)
    for launch in recorder.launches:
        stack = _resources(launch.compiled.asm["cubin"])[1]
        found[launch.kernel] = max(stack, found.get(launch.kernel, 0))
    return found


def main() -> None:
    if sys.argv[1:2] == ["--arch"]:
        print(json.dumps({arch: stacks(int(arch)) for arch in sys.argv[2:]}))
        return
    for name in sys.argv[1:] or WAYS:
        print(json.dumps({name: dict(launches_of_a_layer(WAYS[name]).most_common())}), flush=True)


if __name__ == "__main__":
    main()
