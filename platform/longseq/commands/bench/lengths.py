"""``attention`` and ``step``: time and memory against the length."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from longseq.allocator import keep_freed_memory
from longseq.attention.options import BACKENDS, KERNELS
from longseq.benchmarks.request import (
    ATTENTION_CONTENDERS,
    BIDIRECTIONAL,
    CAUSAL,
    STEP_CONTENDERS,
    STEP_USUAL,
    AttentionRequest,
    Request,
    StepRequest,
)
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress, check_folder, keep
from longseq.errors import LongseqError
from longseq.models.presets import PRESETS

if TYPE_CHECKING:
    from longseq.benchmarks.results import Results


def attention_arguments(parser: argparse.ArgumentParser) -> None:
    _length_arguments(parser, ATTENTION_CONTENDERS, (1024, 2048, 4096, 8192, 16384), seconds=60)
    parser.add_argument("--heads", type=arguments.positive, default=8, metavar="N", help="attention heads")
    parser.add_argument("--head-dim", type=arguments.positive, default=64, metavar="N", help="width of a head")


def run_attention(args: argparse.Namespace) -> int:
    request = AttentionRequest(**_shared(args), heads=args.heads, head_dim=args.head_dim)
    _set_up(request, args.threads)

    from longseq.benchmarks import attention

    results = attention.empty_results(request)
    return _measure(args, request, results, attention.measure)


def step_arguments(parser: argparse.ArgumentParser) -> None:
    _length_arguments(parser, STEP_CONTENDERS, (1024, 2048, 4096, 8192, 16384, 32768), seconds=300)
    parser.set_defaults(contenders=STEP_USUAL)
    parser.add_argument("--preset", choices=PRESETS, default="regular", help="the model's size")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="keep one activation a block: more time, less memory"
    )


def run_step(args: argparse.Namespace) -> int:
    request = StepRequest(**_shared(args), preset=args.preset, activation_checkpointing=args.activation_checkpointing)
    _set_up(request, args.threads)

    from longseq.benchmarks import step

    results = step.empty_results(request)
    return _measure(args, request, results, step.measure)


def _length_arguments(
    parser: argparse.ArgumentParser, contenders: Mapping[str, str], lengths: tuple[int, ...], *, seconds: float
) -> None:
    default = ",".join(map(str, lengths))
    parser.add_argument("--lengths", type=arguments.lengths, default=default, metavar="L,L,…", help="sequence lengths")
    parser.set_defaults(directions=(CAUSAL, BIDIRECTIONAL))
    direction = parser.add_mutually_exclusive_group()
    for name in (CAUSAL, BIDIRECTIONAL):
        direction.add_argument(
            f"--{name}",
            dest="directions",
            action="store_const",
            const=(name,),
            default=argparse.SUPPRESS,
            help=f"{name} attention only, not both",
        )
    parser.add_argument(
        "--contenders",
        type=arguments.names(contenders),
        default=",".join(contenders),
        metavar="NAME,…",
        help="; ".join(f"{name}: {about}" for name, about in contenders.items()),
    )
    parser.add_argument("--batch", type=arguments.positive, default=1, metavar="N", help="sequences at a time")
    parser.add_argument("--features", type=arguments.positive, default=256, metavar="M", help="random features")
    parser.add_argument(
        "--window", type=arguments.natural, default=128, metavar="W", help="of the contender of that name"
    )
    parser.add_argument("--kernel", choices=KERNELS, default="softmax", help="kernel of FAVOR+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the inputs")
    parser.add_argument("--backend", default="auto", help="of longseq's attention: auto, torch, native, triton")
    arguments.threads_argument(parser)
    parser.add_argument("--rounds", type=arguments.positive, default=5, metavar="N", help="times each is timed")
    limit = "stop a contender before a length at which it would take longer, all its rounds together"
    parser.add_argument("--seconds", type=arguments.above_zero, default=seconds, metavar="S", help=limit)


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    given = vars(args)
    return {field.name: given[field.name] for field in fields(Request) if field.name in given}


def _set_up(request: Request, threads: int | None) -> None:
    """Refuse what cannot be measured here, before anything is."""
    import torch

    if request.backend not in BACKENDS:
        raise LongseqError(f"--backend {request.backend}: no such backend; choose from {', '.join(BACKENDS)}.")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise LongseqError("--device cuda: torch finds no CUDA device here; measure with --device cpu.")
    if request.device == "cpu":
        keep_freed_memory()  # as training does
    arguments.set_threads(threads)


def _measure(
    args: argparse.Namespace, request: Any, results: Results, measure: Callable[[Any, Results, Any], None]
) -> int:
    """Run a benchmark against the length, and keep what it found even if it is cut short."""
    from longseq.benchmarks import plot, report

    check_folder(args.out)
    about = report.machine(request.device)
    progress, failure = Progress(), ""
    try:
        measure(request, results, progress)
    except KeyboardInterrupt:
        results.interrupted = True
    except (RuntimeError, MemoryError) as error:  # out of memory, mostly: keep what was measured until then
        failure = f"stopped: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if not results.measurements:
            raise LongseqError(f"nothing was measured; {failure}.") from None
    finally:
        progress.close()
    if not results.measurements:
        if results.interrupted:
            print("longseq: interrupted before anything was measured; nothing is written.", file=sys.stderr)
            return EXIT_INTERRUPTED
        reasons = "; ".join(f"{note.contender} {note.text}" for note in results.notes)
        raise LongseqError(f"nothing was measured: {reasons}.")
    print(report.table(request, results, about))
    print()
    title = f"longseq bench {results.benchmark}: {about['device'] if request.device == 'cuda' else about['processor']}"
    if request.device == "cpu":
        title += f", threads: {about['threads']}"
    numbers = report.as_dict(request, results, about)
    keep(args.out, results.benchmark, numbers, lambda: plot.figure(request, results, title))
    if failure:
        raise LongseqError(f"{failure}; what was measured until then is written.")
    if results.interrupted:
        print("longseq: interrupted: what was measured until then is written.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
