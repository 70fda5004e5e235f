"""Compile every launch of our Triton kernels for GPUs that are not here, and count what a warp would issue.

    python tests/gpu/offline.py                                 # the cases that decide, by this Triton
    python tests/gpu/offline.py --cases all                     # all cases for all chips: some 20 minutes
    python tests/gpu/offline.py --arch 90 --case "scan d64"     # a part of them
    python tests/gpu/offline.py --triton DIR                    # another release, by pip install --target DIR
    python tests/gpu/offline.py --triton DIR --write            # its counts become the ceilings of test_offline.py

"Instructions" are those that one of a multiprocessor's four schedulers issues for 64 tokens of one head.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
CEILINGS = Path(__file__).with_name("ceilings.json")
ARCHITECTURES = (90, 80, 100, 89)  # those that take the longest first
ALL_ARCHITECTURES = (*ARCHITECTURES, 86, 120)
# Of a block, CUDA Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ROWS, LENGTH = 8, 8192  # batch · heads, and tokens
TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One call of an operation, forward and backward."""

    operation: str  # "scan", "bidirectional" or "window"
    head_dim: int = 64
    features: int = 256
    dtype: str = "bfloat16"
    kernel: str = "softmax"
    given: tuple[str, ...] = ()  # of "hidden", "runs", "decay", "gate"
    causal: bool = True  # of a window
    reach: int = 0  # the window, or the scan's delay
    architectures: tuple[int, ...] = ARCHITECTURES

    @property
    def name(self) -> str:
        parts = [self.operation, f"d{self.head_dim}", self.dtype]
        if self.operation != "window":
            parts += [f"m{self.features}", self.kernel]
        elif not self.causal:
            parts.append("both")
        return " ".join([*parts, *([f"reach{self.reach}"] if self.reach else []), *self.given])


ALL, GATED = ("hidden", "runs", "decay"), ("hidden", "runs", "gate")
# Every kernel for every chip, which the newest release of Triton must manage too.
EVERY_KERNEL = (Case("scan"), Case("window", reach=64))
# What else decides whether kernels are as they should be, each for the chips that are the first to fail.
DECISIVE = (
    *EVERY_KERNEL,
    Case("scan", reach=64, given=ALL, architectures=(80, 90)),
    Case("scan", head_dim=128, architectures=(80, 90)),
    Case("scan", dtype="float32", architectures=(89,)),
    Case("bidirectional", kernel="relu", architectures=(90,)),
    Case("window", reach=256, causal=False, given=ALL, architectures=(90,)),
    Case("scan", given=("gate",), architectures=(80, 90)),
    Case("window", reach=64, given=("gate",), architectures=(80, 90)),
)
_PRODUCT = (
    *DECISIVE,
    Case("scan", head_dim=128, reach=64, given=ALL),
    Case("scan", head_dim=32, features=64),
    Case("scan", features=512),
    Case("scan", head_dim=128, features=512),
    Case("scan", dtype="float16"),
    Case("scan", head_dim=128, dtype="float32"),
    Case("scan", head_dim=32, features=64, dtype="float32"),
    Case("bidirectional", head_dim=128, given=("hidden",)),
    Case("bidirectional", head_dim=128, dtype="float32"),
    Case("scan", head_dim=128, reach=64, given=GATED),
    Case("scan", dtype="float32", given=("gate",)),
    Case("window", reach=256, causal=False, given=GATED),
    Case("window", head_dim=32, reach=64),
    Case("window", head_dim=128, reach=64),
    Case("window", head_dim=128, reach=256, causal=False, given=ALL),
    Case("window", dtype="float32", reach=64),
    Case("window", head_dim=128, dtype="float32", reach=64),
)
CASES = {
    "every-kernel": EVERY_KERNEL,
    "decisive": DECISIVE,
    "all": tuple(replace(case, architectures=ALL_ARCHITECTURES) for case in _PRODUCT),
}


@dataclass
class Found:
    """What the launches of one kernel in one pass of a case need; sums and maxima over them."""

    case: str
    where: str  # "forward" or "backward"
    kernel: str
    arch: int
    triton: str
    registers: int = 0  # of a thread
    threads: int = 0  # of a block
    shared: int = 0  # bytes of a block
    tensor_memory: int = 0  # columns, on sm_100
    spilled: int = 0  # bytes of a thread's stack
    instructions: float = 0.0
    flops: float = 0.0  # of matrix instructions, a token and head; 0 on sm_100, whose instructions do not name them
    programs: int = 0  # of the smallest launch
    launches: int = 0
    compiled_again: int = 0  # launches of another length that are another kernel
    matrix: dict[str, int] = field(default_factory=dict)  # matrix instructions in the code

    def add(self, launch: "Launch", recorder: "Recorder", count: bool) -> None:  # noqa: F821, UP037
        from tests.gpu.sass import matrix_flops

        metadata = launch.compiled.metadata
        registers, stack = _resources(launch.compiled.asm["cubin"])
        issued = recorder.instructions(launch) if count else {}
        warps = launch.programs * metadata.num_warps
        self.registers, self.spilled = max(self.registers, registers), max(self.spilled, stack)
        self.threads = max(self.threads, 32 * metadata.num_warps)
        self.shared = max(self.shared, metadata.shared)
        self.tensor_memory = max(self.tensor_memory, getattr(metadata, "tmem_size", None) or 0)
        self.instructions += sum(issued.values()) * warps / 4 / (ROWS * LENGTH / TOKENS)
        self.flops += sum(matrix_flops(name) * n for name, n in issued.items()) * warps / (ROWS * LENGTH)
        self.programs = min(self.programs or launch.programs, launch.programs)
        self.launches += 1
        self.matrix = dict(Counter(self.matrix) | launch.program().matrix_instructions)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where what does not fit into registers goes."""
    from tests.gpu.launches import TOOLS

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed}")
    return int(found[1]), int(found[2])


def measure_here(arch: int, cases: Sequence[Case]) -> list[Found]:
    """In this process, whose Triton is from then on one without a GPU."""
    import torch
    import triton
    from tests.gpu.launches import Recorder

    from longseq.attention.feature_maps import feature_map
    from longseq.attention.operations import bidirectional_attention, scan, window_attention
    from longseq.attention.scan import Rows

    def inputs(case: Case, length: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        dtype = getattr(torch, case.dtype)
        rows = [torch.zeros(ROWS, length, case.head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
        given = {
            "hidden": torch.zeros(ROWS, length, dtype=torch.bool),
            "runs": torch.zeros(ROWS, length, dtype=torch.int64),
            "decay": torch.zeros(ROWS, 1, 1, requires_grad=True),
            "gate": torch.zeros(ROWS, length + 1, 1, dtype=torch.float64, requires_grad=True),
        }
        return rows, {name: x for name, x in given.items() if name in case.given}

    def call(case: Case, length: int = LENGTH) -> Sequence[torch.Tensor]:
        rows, given = inputs(case, length)
        if case.operation == "window":
            return window_attention(Rows(*rows, **given), case.reach, case.causal, "triton")
        phi = feature_map(case.kernel, case.features, case.head_dim)
        if case.operation == "scan":
            return scan(Rows(*rows, phi=phi, delay=case.reach, **given), "triton")
        return (bidirectional_attention(Rows(*rows, hidden=given.get("hidden"), phi=phi), "triton"),)

    def both_passes(recorder: Recorder, outputs: Sequence[torch.Tensor]) -> None:
        recorder.where = "backward"
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        recorder.where = "forward"

    found: dict[tuple[str, str, str], Found] = {}
    # In the code of Triton 3.9 for sm_100 a loop hangs on a barrier in memory, which the count cannot follow.
    count = arch != 100 or triton.__version__ == json.loads(CEILINGS.read_text())["triton"]
    torch.set_num_threads(1)
    with Recorder(arch).installed() as recorder:
        for case in cases:
            recorder.launches.clear()
            both_passes(recorder, call(case))
            for launch in recorder.launches:
                key = (case.name, launch.where, launch.kernel)
                found.setdefault(key, Found(*key, arch, triton.__version__)).add(launch, recorder, count)
            known = {launch.compiled.hash for launch in recorder.launches}
            if case.dtype != "float32":  # a length that is no multiple of anything
                recorder.launches.clear()
                both_passes(recorder, call(case, LENGTH - 1))
                for launch in recorder.launches:
                    found[case.name, launch.where, launch.kernel].compiled_again += launch.compiled.hash not in known
    return list(found.values())


def measure(cases: str, other_triton: str | None = None, part: str = "", only: Sequence[int] = ()) -> list[Found]:
    """Cases by their key in ``CASES``, those whose name contains ``part``: a process per architecture and core."""
    architectures = [
        arch for arch in ALL_ARCHITECTURES if arch in (only or {a for c in CASES[cases] for a in c.architectures})
    ]
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(os.cpu_count()) as pool:

        def one(arch: int) -> list[Found]:
            printed = _child(["--arch", str(arch), "--cases", cases, "--case", part], other_triton, cache)
            return [Found(**row) for row in json.loads(printed)]

        return [row for rows in pool.map(one, architectures) for row in rows]


def _child(arguments: Sequence[str], other_triton: str | None, cache: str) -> str:
    """What this file prints, run with those arguments by a Python in which kernels are compiled."""
    path = [*([other_triton] if other_triton else []), str(ROOT), str(ROOT / "platform"), str(ROOT / "pipelines")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": cache,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--worker", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-4000:]}")
    return done.stdout


def ceilings(rows: Sequence[Found]) -> dict[str, dict[str, list[int]]]:
    """Instructions and bytes spilled, by architecture and case, pass and kernel."""
    table: dict[str, dict[str, list[int]]] = {}
    for row in sorted(rows, key=lambda row: row.arch):
        name = f"{row.case}: {row.where} {row.kernel}"
        table.setdefault(f"sm_{row.arch}", {})[name] = [round(row.instructions), row.spilled]
    return table


def table(rows: Sequence[Found]) -> Iterator[str]:
    """Lines for people."""
    names = f"{'kernel':24} {'arch':>4} {'reg':>4} {'shared':>7} {'tmem':>4} {'spill':>5} {'instr':>7}"
    yield f"{names} {'programs':>8} {'n':>2}  matrix instructions"
    last = None
    for row in rows:
        group = (row.arch, row.case, row.where)
        if group != last:
            total = sum(r.instructions for r in rows if (r.arch, r.case, r.where) == group)
            yield f"{row.case}, {row.where}: {total:,.0f}"
            last = group
        kinds = " ".join(f"{n}×{name}" for name, n in row.matrix.items())
        yield (
            f"  {row.kernel:22} {row.arch:4} {row.registers:4} {row.shared:7} {row.tensor_memory:4} {row.spilled:5} "
            f"{row.instructions:7,.0f} {row.programs:8} {row.launches:2}  {kinds}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="default: all that the cases name")
    parser.add_argument("--cases", choices=list(CASES), default="decisive")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--triton", help="a folder with another release of Triton")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--write", action="store_true", help=f"write {CEILINGS.name}")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        arch = asked.arch[0]
        cases = [case for case in CASES[asked.cases] if asked.case in case.name and arch in case.architectures]
        print(json.dumps([asdict(row) for row in measure_here(arch, cases)]))
        return
    rows = measure(asked.cases, asked.triton, asked.case, asked.arch or ())
    print("\n".join(table(rows)))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if asked.write:
        known = {"triton": rows[0].triton, **ceilings(rows)}
        # One line a kernel, so that a change is seen line by line.
        text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(known, indent=1))
        CEILINGS.write_text(text + "\n")


if __name__ == "__main__":
    main()
