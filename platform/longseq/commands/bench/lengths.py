"""``attention`` and ``step``: time and memory against the length."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longseq.allocator import keep_freed_memory
from longseq.attention.options import BACKENDS
from longseq.benchmarks.request import BIDIRECTIONAL, CAUSAL, AttentionRequest, Request, StepRequest
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress, check_folder, keep
from longseq.errors import LongseqError

if TYPE_CHECKING:
    from longseq.benchmarks.results import Results


def attention_arguments(parser: argparse.ArgumentParser) -> None:
    _length_arguments(parser, AttentionRequest)


def run_attention(args: argparse.Namespace) -> int:
    request = arguments.asked(AttentionRequest, args)
    _set_up(request, args.threads)

    from longseq.benchmarks import attention

    return _measure(args, request, attention.empty_results(request), attention.measure)


def step_arguments(parser: argparse.ArgumentParser) -> None:
    _length_arguments(parser, StepRequest)


def run_step(args: argparse.Namespace) -> int:
    request = arguments.asked(StepRequest, args)
    _set_up(request, args.threads)

    from longseq.benchmarks import step

    return _measure(args, request, step.empty_results(request), step.measure)


def _length_arguments(parser: argparse.ArgumentParser, request: type) -> None:
    arguments.add_fields(parser, request)
    parser.set_defaults(directions=(CAUSAL, BIDIRECTIONAL))
    direction = parser.add_mutually_exclusive_group()
    for name in (CAUSAL, BIDIRECTIONAL):
        about = {"dest": "directions", "const": (name,), "help": f"{name} attention only, not both"}
        direction.add_argument(f"--{name}", action="store_const", default=argparse.SUPPRESS, **about)  # type: ignore[arg-type]
    arguments.threads_argument(parser)


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
    failure = ""
    with Progress() as progress:
        try:
            measure(request, results, progress)
        except KeyboardInterrupt:
            results.interrupted = True
        except (RuntimeError, MemoryError) as error:  # out of memory, mostly: keep what was measured until then
            failure = f"stopped: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if not results.measurements:
                raise LongseqError(f"nothing was measured; {failure}.") from None
    if not results.measurements:
        if results.interrupted:
            print("longseq: interrupted before anything was measured; nothing is written.", file=sys.stderr)
            return EXIT_INTERRUPTED
        reasons = "; ".join(f"{note.contender} {note.text}" for note in results.notes)
        raise LongseqError(f"nothing was measured: {reasons}.")
    print(report.table(request, results, about))
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
