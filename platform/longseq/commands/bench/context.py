"""``context`` and ``needle``: long sequences, in slices on several processes, and what only they can teach."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.benchmarks.request import ContextSizes, NeedleRequest
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress, check_folder, keep
from longseq.commands.numbers import above_zero


def context_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_fields(parser, ContextSizes)
    gpu = parser.add_argument_group("GPUs to extrapolate to; an H100 by default, see benchmarks/context_model.py")
    gpu.add_argument("--gpu-flops", type=above_zero, default=400e12, metavar="F", help="FLOP/s that it reaches")
    gpu.add_argument("--bandwidth", type=above_zero, default=450e9, metavar="B", help="bytes/s inside a node")
    gpu.add_argument("--latency", type=above_zero, default=3e-6, metavar="S", help="seconds a message there")
    gpu.add_argument("--bandwidth-between", type=above_zero, default=50e9, metavar="B", help="between nodes")
    gpu.add_argument("--latency-between", type=above_zero, default=6e-6, metavar="S", help="between nodes")


def run_context(args: argparse.Namespace) -> int:
    from longseq.benchmarks import context
    from longseq.benchmarks.context_model import Cluster, Link

    check_folder(args.out)
    between = Link(args.bandwidth_between, args.latency_between)
    gpu = Cluster(args.gpu_flops, Link(args.bandwidth, args.latency), between)
    request = arguments.asked(context.ContextRequest, args, gpu=gpu)
    cells: list[context.Cell] = []
    code = 0
    with Progress() as progress:

        def found(cell: context.Cell) -> None:
            cells.append(cell)
            progress.line(f"{cell.length:,} tokens, {cell.processes} process(es): {cell.median:.2f} s")

        try:
            context.measure(request, found)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
    if not any(cell.processes == 1 for cell in cells):
        if not code:
            context.calibrated(cells, request.spec, request.batch)  # says what is missing
        print("longseq: interrupted before anything was measured; nothing is written.", file=sys.stderr)
        return code
    print(context.table(request, cells))
    keep(args.out, "context", context.numbers(request, cells), lambda: context.figure(request, cells))
    return code


def needle_arguments(parser: argparse.ArgumentParser) -> None:
    what = "UTF-8 text or FASTA, plain or gzipped, that the values are planted in; none: made-up proteins"
    parser.add_argument("text", nargs="*", type=Path, metavar="FILE", help=what)
    arguments.add_fields(parser, NeedleRequest)
    arguments.threads_argument(parser)


def run_needle(args: argparse.Namespace) -> int:
    from longseq.allocator import keep_freed_memory
    from longseq.errors import LongseqError

    check_folder(args.out)
    arguments.set_threads(args.threads)
    keep_freed_memory()

    from longseq.benchmarks import needle

    request = arguments.asked(NeedleRequest, args)
    if request.gap > request.length - 16 * request.keys or request.short > request.length - request.gap:
        raise LongseqError(
            f"--length {request.length} --gap {request.gap} --short {request.short}: the values need room before the "
            "gap, and the gap must be longer than the short context can bridge."
        )
    with Progress() as progress:
        found = needle.measure(request, needle.read_texts(args.text), progress.now, progress.line)
    print(needle.table(request, found))
    keep(args.out, "needle", needle.numbers(request, found))
    return 0
