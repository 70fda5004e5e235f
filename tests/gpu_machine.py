"""A machine that claims to have GPUs, as far as starting a training asks for them: what it would do is recorded.

CUDA_VISIBLE_DEVICES decides what a process sees, as with a driver: indices, UUIDs, or MIG instances, of which a process
gets the first. Tensors for a GPU are made on the CPU, and NCCL is gloo.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

GPUS = 8


class GpuMachine:
    """Install it with :meth:`__enter__`. ``calls``: (what, device) in their order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self._patches: list[Any] = []

    def visible(self) -> list[str]:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS)))).split(",")
        shown = [f"GPU-{name}" if name.isdigit() else name for name in shown if name]
        return shown[:1] if shown and shown[0].startswith("MIG-") else shown

    def uuid(self, index: int) -> str:
        """As of a driver for which MIG instances have their GPU's."""
        name = self.visible()[index]
        return "GPU-0" if name.startswith("MIG-") else name

    def set_device(self, device: Any) -> None:
        index = torch.device(device).index if not isinstance(device, int) else device
        if not 0 <= index < len(self.visible()):
            raise RuntimeError("CUDA error: invalid device ordinal")
        self.calls.append(("set_device", f"cuda:{index}"))

    def __enter__(self) -> GpuMachine:
        import torch.distributed as dist
        from lightning.fabric.accelerators import cuda as fabric
        from lightning.pytorch.accelerators import cuda

        start, makers = dist.init_process_group, {name: getattr(torch, name) for name in ("ones", "empty", "tensor")}

        def init(backend: str, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
            self.calls.append((f"init {backend}", str(device_id)))
            start("gloo", *args, **kwargs)

        def on_cpu(name: str) -> Any:
            return lambda *args, device=None, **kwargs: makers[name](*args, **kwargs)

        values = {
            "torch.cuda.is_available": lambda: bool(self.visible()),
            "torch.cuda.device_count": lambda: len(self.visible()),
            "torch.cuda.set_device": self.set_device,
            "torch.cuda.synchronize": lambda device=None: None,
            "torch.cuda.get_device_properties": lambda d: SimpleNamespace(uuid=self.uuid(torch.device(d).index)),
            "torch.distributed.init_process_group": init,
            **{f"torch.{name}": on_cpu(name) for name in makers},
        }
        self._patches = [mock.patch(name, value) for name, value in values.items()]
        self._patches += [mock.patch.object(m, "_check_cuda_matmul_precision") for m in (fabric, cuda)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()
