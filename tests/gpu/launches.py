"""What the launchers of our Triton kernels would launch on a GPU that is not here.

The launchers run for real, on CPU tensors, forward and backward, with a driver that only claims to be a GPU. Each
launch is compiled, with the specialisation of a real one, and noted down instead of started: no kernel is known by name
here. The results that the launchers see are whatever was in memory. To be imported where kernels are not interpreted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from tests.gpu.offline import SHARED_MEMORY
from tests.gpu.sass import Program, constant_bank
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from longseq.attention.backends.triton import launch as triton_launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """As much of a driver of Triton as compiling asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@dataclass
class Launch:
    """One launch of a kernel."""

    kernel: str
    constants: dict[str, Any]  # tl.constexpr parameters
    grid: tuple[int, int, int]
    compiled: Any  # triton's CompiledKernel, not loaded
    values: list[int]  # of the arguments that are passed, in their order; pointers as numbers
    sizes: list[int]  # of these, in bytes
    where: str = ""  # "forward" or "backward"

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def program(self) -> Program:
        return _program(self.compiled.asm["cubin"])


@functools.cache
def _program(cubin: bytes) -> Program:
    return Program.of(cubin, TOOLS / "nvdisasm")


@dataclass
class Recorder:
    """Launches as they would happen."""

    arch: int
    launches: list[Launch] = field(default_factory=list)
    where: str = "forward"

    @contextlib.contextmanager
    def installed(self) -> Iterator[Recorder]:
        """Triton compiles for ``arch`` and launches nothing; the launchers choose their tiles for such a GPU."""
        run, subscript, before = JITFunction.run, JITFunction.__getitem__, triton_launch.ELSEWHERE
        supported = triton_launch.unsupported

        def record(function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            compiled = run(function, *args, grid=grid, warmup=True, **kwargs)
            self.launches.append(self._launch(function, compiled, args, grid, kwargs))

        def launcher(function: JITFunction, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: function.run(*args, grid=grid, **kwargs)

        triton.runtime.driver.set_active(_Driver(self.arch))
        JITFunction.run, JITFunction.__getitem__ = record, launcher
        triton_launch.ELSEWHERE = triton_launch.Chip(divmod(self.arch, 10), SHARED_MEMORY[self.arch])
        triton_launch.unsupported = lambda feature_map, rows: None  # CPU tensors are
        try:
            yield self
        finally:
            JITFunction.run, JITFunction.__getitem__ = run, subscript
            triton_launch.ELSEWHERE, triton_launch.unsupported = before, supported

    def _launch(
        self, function: JITFunction, compiled: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]
    ) -> Launch:
        given = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
        if callable(grid):
            grid = grid(given)
        passed = [(name, kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        sizes, values = [], []
        for name, kind in passed:
            if kind.startswith("tensordesc"):
                raise NotImplementedError(f"{function.fn.__name__}: how descriptors are passed is not known here")
            value = given[name]
            sizes.append(8 if kind.startswith("*") else max(4, int(kind.lstrip("iufpb")) // 8))
            values.append(value.data_ptr() if isinstance(value, torch.Tensor) else value if kind[0] in "iu" else 0)
        constants = {p.name: given[p.name] for p in function.params if p.is_constexpr and p.name in given}
        return Launch(
            kernel=function.fn.__name__,
            constants=constants,
            grid=(*grid, 1, 1)[:3],
            compiled=compiled,
            values=[*values, 0, 0],  # two pointers of Triton's own: scratch memory
            sizes=[*sizes, 8, 8],
            where=self.where,
        )

    def instructions(self, launch: Launch) -> dict[str, int]:
        """How often a warp of the program in the middle of the grid issues each instruction."""
        threads = 32 * launch.compiled.metadata.num_warps
        bank = constant_bank(self.arch, launch.sizes, launch.values, launch.grid, threads)
        middle = tuple(x // 2 for x in launch.grid)
        return launch.program().run(bank, middle)  # type: ignore[arg-type]
