"""``context`` and ``needle``: long sequences, in slices on several processes, and what only they can teach."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress, check_folder, keep, keep_numbers
from longseq.models.presets import PRESETS


def context_arguments(parser: argparse.ArgumentParser) -> None:
    default = "8192,16384,32768,65536"
    parser.add_argument(
        "--lengths", type=arguments.lengths, default=default, metavar="L,L,…", help="tokens per sequence"
    )
    about = "processes that share a sequence"
    parser.add_argument("--processes", type=arguments.lengths, default="1,2", metavar="P,P,…", help=about)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model's size")
    parser.add_argument("--features", type=arguments.positive, default=256, metavar="M", help="random features")
    parser.add_argument("--window", type=arguments.natural, default=0, metavar="W", help="exact window; 0: none")
    parser.add_argument("--vocabulary", type=arguments.positive, default=256, metavar="N", help="tokens there are")
    parser.add_argument("--batch", type=arguments.positive, default=1, metavar="N", help="sequences at a time")
    parser.add_argument("--tile", type=arguments.natural, default=4096, metavar="T", help="as model.sequence_tile")
    about = "of weights and activations"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=about)
    parser.add_argument("--threads", type=arguments.positive, default=1, metavar="N", help="of each process")
    parser.add_argument("--rounds", type=arguments.positive, default=1, metavar="N", help="steps that are timed")
    warmups = "steps before them that are not"
    parser.add_argument("--warmups", type=arguments.natural, default=1, metavar="N", help=warmups)
    gpu = parser.add_argument_group("GPUs to extrapolate to; an H100 by default, see benchmarks/context_model.py")
    gpu.add_argument(
        "--gpu-flops", type=arguments.above_zero, default=400e12, metavar="F", help="FLOP/s that it reaches"
    )
    gpu.add_argument("--bandwidth", type=arguments.above_zero, default=450e9, metavar="B", help="bytes/s inside a node")
    gpu.add_argument("--latency", type=arguments.above_zero, default=3e-6, metavar="S", help="seconds a message there")
    gpu.add_argument("--bandwidth-between", type=arguments.above_zero, default=50e9, metavar="B", help="between nodes")
    gpu.add_argument("--latency-between", type=arguments.above_zero, default=6e-6, metavar="S", help="between nodes")
    gpu.add_argument("--gpu-length", type=arguments.positive, default=2**20, metavar="L", help="tokens, strong scaling")
    gpu.add_argument("--gpu-slice", type=arguments.positive, default=2**17, metavar="L", help="tokens per GPU, weak")


def run_context(args: argparse.Namespace) -> int:
    from longseq.benchmarks import context
    from longseq.benchmarks.context_model import Cluster, Link

    check_folder(args.out)
    between = Link(args.bandwidth_between, args.latency_between)
    request = context.ContextRequest(
        gpu=Cluster(args.gpu_flops, Link(args.bandwidth, args.latency), between),
        lengths=args.lengths,
        processes=args.processes,
        preset=args.preset,
        vocabulary=args.vocabulary,
        features=args.features,
        window=args.window,
        batch=args.batch,
        tile=args.tile,
        dtype=args.dtype,
        threads=args.threads,
        rounds=args.rounds,
        warmups=args.warmups,
        gpu_length=args.gpu_length,
        gpu_slice=args.gpu_slice,
    )
    cells: list[context.Cell] = []
    progress, code = Progress(), 0

    def found(cell: context.Cell) -> None:
        cells.append(cell)
        progress.line(f"{cell.length:,} tokens, {cell.processes} process(es): {cell.median:.2f} s")

    try:
        context.measure(request, found)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    finally:
        progress.close()
    if not any(cell.processes == 1 for cell in cells):
        if not code:
            context.calibrated(cells, request.spec, request.batch)  # says what is missing
        print("longseq: interrupted before anything was measured; nothing is written.", file=sys.stderr)
        return code
    print(context.table(request, cells))
    print()
    keep(args.out, "context", context.numbers(request, cells), lambda: context.figure(request, cells))
    return code


def needle_arguments(parser: argparse.ArgumentParser) -> None:
    what = "UTF-8 text or FASTA, plain or gzipped, that the values are planted in; none: made-up proteins"
    parser.add_argument("text", nargs="*", type=Path, metavar="FILE", help=what)
    parser.add_argument("--length", type=arguments.positive, default=131_072, metavar="L", help="tokens per sequence")
    gap = "tokens between the last value and the first question, at least"
    parser.add_argument("--gap", type=arguments.positive, default=102_400, metavar="L", help=gap)
    parser.add_argument("--short", type=arguments.positive, default=4096, metavar="L", help="the short model's context")
    parser.add_argument("--keys", type=arguments.positive, default=4, metavar="N", help="values that are planted")
    base = "as model.rotary_base: at the usual 10,000 nothing is found far away"
    parser.add_argument("--rotary-base", type=arguments.above_zero, default=1e9, metavar="B", help=base)
    parser.add_argument("--steps", type=arguments.positive, default=400, metavar="N", help="at most, at each length")
    parser.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="of weights and sequences")
    arguments.threads_argument(parser)


def run_needle(args: argparse.Namespace) -> int:
    from longseq.allocator import keep_freed_memory
    from longseq.errors import LongseqError

    check_folder(args.out)
    arguments.set_threads(args.threads)
    keep_freed_memory()

    from longseq.benchmarks import needle

    request = needle.NeedleRequest(
        length=args.length,
        gap=args.gap,
        short=args.short,
        keys=args.keys,
        rotary_base=args.rotary_base,
        steps=args.steps,
        seed=args.seed,
    )
    if request.gap > request.length - 16 * request.keys or request.short > request.length - request.gap:
        raise LongseqError(
            f"--length {request.length} --gap {request.gap} --short {request.short}: the values need room before the "
            "gap, and the gap must be longer than the short context can bridge."
        )
    progress = Progress()
    try:
        found = needle.measure(request, needle.read_texts(args.text), progress.now, progress.line)
    finally:
        progress.close()
    print(needle.table(request, found))
    keep_numbers(args.out, "needle", needle.numbers(request, found))
    return 0
