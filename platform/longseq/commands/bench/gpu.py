"""``gpu``: whether all of it works on this machine's GPU, and how fast."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from longseq.benchmarks.gpu.parts import CPU_PATIENCE, PARTS
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, check_folder
from longseq.commands.numbers import above_zero, positive
from longseq.errors import EXIT_ERROR, LongseqError

if TYPE_CHECKING:
    from longseq.benchmarks.gpu.running import Found


def gpu_arguments(parser: argparse.ArgumentParser) -> None:
    about = {part.name: part.about for part in PARTS.values()}
    default = "all of them on a GPU; on a CPU those that prove something"
    listed = "; ".join(f"{name}: {words}" for name, words in about.items())
    parser.add_argument("--parts", type=arguments.names(about), metavar="NAME,…", help=f"{listed} (default: {default})")
    parser.add_argument("--minutes", type=above_zero, default=9.0, metavar="M", help="for everything together")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU where there is one"
    )
    jobs = max(1, (os.cpu_count() or 1) // 3)
    parser.add_argument("--jobs", type=positive, default=jobs, metavar="N", help="parts that run at a time")


def run_gpu(args: argparse.Namespace) -> int:
    import torch

    from longseq.benchmarks.gpu.report import head, summary, table
    from longseq.benchmarks.gpu.running import Runner, write_json
    from longseq.benchmarks.report import machine

    began, path = time.monotonic(), args.out / "gpu.json"
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise LongseqError("--device cuda: torch finds no CUDA device here; try --device cpu.")
    device = "cuda" if there and args.device != "cpu" else "cpu"
    parts = [part for part in PARTS.values() if not args.parts or part.name in args.parts]
    if device == "cpu":
        timed = [part.name for part in parts if not part.correct]
        if args.parts and timed:
            raise LongseqError(f"--parts {','.join(timed)}: they take times of a GPU, and there is none here.")
        # No times are taken, for which a part would be alone and time would be held back.
        parts = [replace(part, seconds=CPU_PATIENCE * part.seconds, alone=False) for part in parts if part.correct]
    check_folder(args.out)
    about = machine(device)

    def keep(found: Sequence[Found]) -> None:
        numbers = {"benchmark": "gpu", "machine": about, "minutes": (time.monotonic() - began) / 60}
        write_json(path, {**numbers, "summary": summary(found), "parts": [part.as_dict() for part in found]})

    def say(found: Found) -> None:
        print(head(found), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="longseq-bench-gpu-", ignore_cleanup_errors=True) as folder:
        seconds = args.minutes * 60 - (time.monotonic() - began)
        runner = Runner(parts, device, seconds=seconds, jobs=args.jobs, folder=Path(folder), keep=keep, say=say)
        code = 0
        with _stopped_as_by_ctrl_c():
            try:
                runner.run()
            except KeyboardInterrupt:
                code = EXIT_INTERRUPTED
    print(table(runner.found, about, (time.monotonic() - began) / 60))
    print(f"\nkept in {path}")
    return code or (EXIT_ERROR if any(found.bad for found in runner.found) else 0)


@contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """`timeout` and schedulers send SIGTERM: what was found until then is worth a table."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
