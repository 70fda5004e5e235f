"""The process of one part: ``python -m longseq.benchmarks.gpu.worker PART ROWS``. Started by ``running``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

from longseq.benchmarks.gpu.rows import Rows
from longseq_data.children import end_when_closed

# Each part's module and function; the function is given the rows, the device ("cpu" or "cuda") and a folder of its own.
WORK = {
    "kernels-bf16": ("kernels", "bf16"),
    "kernels-fp32": ("kernels", "fp32"),
    "kernels-fp16": ("kernels", "fp16"),
    "blocks": ("blocks", "check"),
    "later-keys": ("kernels", "later_keys"),
    "strategies": ("training", "strategies"),
    "precisions": ("training", "precisions"),
    "compile": ("training", "compiled"),
    "resume": ("training", "resume"),
    "preflight": ("training", "preflight"),
    "attention": ("speed", "attention"),
    "step": ("speed", "step"),
    "million": ("speed", "million"),
    "decode": ("speed", "decode"),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=WORK)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="shared by all parts of one benchmark")
    parser.add_argument("--parent-pipe", type=int, required=True)
    args = parser.parse_args()
    end_with_parent(args.parent_pipe)
    module, function = WORK[args.part]
    work = getattr(importlib.import_module(f"longseq.benchmarks.gpu.{module}"), function)
    work(Rows(args.rows), args.device, args.folder)
    return 0


def end_with_parent(pipe: int) -> None:
    """Die when the parent's end of the pipe closes, with all that this process has started: its own group."""
    end_when_closed(pipe, lambda: os.killpg(0, signal.SIGKILL))


if __name__ == "__main__":
    sys.exit(main())
