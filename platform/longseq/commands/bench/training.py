"""``overhead``, ``watching``, ``memory``: what a training costs next to a plain loop, or takes next to its estimate."""

from __future__ import annotations

import argparse

from longseq.benchmarks.request import MemoryRequest, OverheadRequest, WatchingRequest
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress, check_folder, keep


def overhead_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(parser, OverheadRequest, "e.g. trainer.zero_stage=3")


def run_overhead(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)
    check_folder(args.out)

    from longseq.benchmarks import overhead

    request = arguments.asked(OverheadRequest, args)
    with Progress() as progress:
        results = overhead.measure(request, progress.now)
    print(overhead.table(request, results))
    keep(args.out, "overhead", overhead.numbers(request, results))
    return 0


def watching_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(parser, WatchingRequest, "e.g. trainer.log_every=50")


def run_watching(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)
    check_folder(args.out)

    from longseq.benchmarks import watching

    request = arguments.asked(WatchingRequest, args)
    results = watching.measure(request)
    print(watching.table(request, results))
    keep(args.out, "watching", watching.numbers(request, results))
    return 0


def memory_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(parser, MemoryRequest, "e.g. trainer.precision=bf16")


def run_memory(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)
    check_folder(args.out)

    from longseq.benchmarks import training_memory

    request, code = arguments.asked(MemoryRequest, args), 0
    found: list[training_memory.CellResult] = []

    def note(result: training_memory.CellResult) -> None:
        found.append(result)
        print(training_memory.row(result), flush=True)

    print(training_memory.HEAD)
    try:
        training_memory.measure(request, note)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    good = sum(result.good for result in found)
    print(f"\n{good} of {len(found)} estimates within {training_memory.GOAL:.0%} of the measured peak of tensors")
    keep(args.out, "memory", training_memory.numbers(request, found))
    return code


def _arguments(parser: argparse.ArgumentParser, request: type, example: str) -> None:
    arguments.add_fields(parser, request)
    arguments.threads_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)
