"""Which instructions a program of a compiled kernel would issue, and how often: its SASS followed without a GPU.

A warp's way through a kernel depends on the arguments' sizes, the program's number and the grid, and hardly ever on
what is in memory. So the integers and predicates of thread 0 are computed as the GPU would, everything else is
unknown, and each instruction on the way is counted, once for every time it would be issued. A branch that hangs on
something unknown is not taken (it skips what a bounds check or a special value makes needless), and is an error where
it closes or skips a loop.

Opcodes: NVIDIA, CUDA Binary Utilities, "Instruction Set Reference". Their operands are printed by nvdisasm.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

WORD = 0xFFFFFFFF
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?)(U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+|[.\w$]+):")


@dataclass(frozen=True)
class Instruction:
    op: str  # without modifiers
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None  # the predicate that it hangs on, with "!" where it is negated

    @property
    def name(self) -> str:
        return ".".join((self.op, *self.modifiers))


@dataclass(frozen=True)
class Program:
    """The machine code of one kernel."""

    code: tuple[Instruction, ...]
    labels: dict[str, int]

    @classmethod
    def of(cls, cubin: bytes, nvdisasm: Path) -> Program:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            done = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True)
        return cls.parse(done.stdout)

    @classmethod
    def parse(cls, text: str) -> Program:
        """What ``nvdisasm -c`` prints of one kernel."""
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(code)
            elif found := _LINE.search(line):
                negated, guard, name, operands = found.groups()
                op, *modifiers = name.split(".")
                code.append(Instruction(op, tuple(modifiers), _split(operands), f"{negated}{guard}" if guard else None))
        return cls(tuple(code), labels)

    @cached_property
    def matrix_instructions(self) -> Counter[str]:
        return Counter(i.name for i in self.code if i.op in ("HGMMA", "HMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA"))

    def run(self, constants: dict[int, int], program: tuple[int, int, int]) -> Counter[str]:
        """How often one warp issues each instruction, by its full name.

        Args:
            constants: the words of constant bank 0 by address, see :func:`constant_bank`.
            program: tl.program_id of the axes.
        """
        from tests.gpu.warp import Warp

        return Warp(self, constants, program).run()


def constant_bank(
    arch: int, sizes: list[int], values: list[int], grid: tuple[int, int, int], threads: int
) -> dict[int, int]:
    """Constant bank 0 as a kernel finds it: its arguments, of those sizes in bytes, the grid and the block."""
    bank: dict[int, int] = {}
    base = 0x160 if arch < 90 else 0x210 if arch < 100 else 0x380
    block_at, grid_at = (0x0, 0xC) if arch < 100 else (0x360, 0x370)
    for place, word in enumerate((threads, 1, 1)):
        bank[block_at + 4 * place] = word
    for place, word in enumerate(grid):
        bank[grid_at + 4 * place] = word
    bank[0x28 if arch < 100 else 0x37C] = 0x10000  # the top of the stack
    for size, value in zip(sizes, values, strict=True):
        base = (base + size - 1) // size * size
        for word in range(max(1, size // 4)):
            bank[base + 4 * word] = value >> 32 * word & WORD
        base += size
    return bank


def matrix_flops(name: str) -> int:
    """Floating-point operations that one warp's share of a matrix instruction does; 0 for other instructions."""
    if found := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", name):  # of a warpgroup, four warps
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // 4
    if found := re.match(r"HMMA\.16(8)(4|8|16)\b", name):
        return 2 * 16 * int(found[1]) * int(found[2])
    return 0


def _split(operands: str) -> tuple[str, ...]:
    """At commas outside of brackets."""
    return tuple(x.strip() for x in re.split(r",(?![^\[\(]*[\]\)])", operands) if x.strip())
