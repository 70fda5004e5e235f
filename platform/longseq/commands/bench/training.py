"""``overhead`` and ``memory``: what a training costs next to a plain loop, and takes next to its estimate."""

from __future__ import annotations

import argparse

from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress, check_folder, keep_numbers
from longseq.models.presets import PRESETS


def overhead_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model's size")
    parser.add_argument("--length", type=arguments.positive, default=512, metavar="L", help="tokens per sequence")
    parser.add_argument("--batch", type=arguments.positive, default=2, metavar="N", help="sequences per step")
    parser.add_argument("--steps", type=arguments.positive, default=10, metavar="N", help="of each turn")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=5, metavar="N", help="turns of each that are counted"
    )
    arguments.threads_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.zero_stage=3")


def run_overhead(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)
    check_folder(args.out)

    from longseq.benchmarks import overhead

    request = overhead.OverheadRequest(
        preset=args.preset,
        length=args.length,
        batch=args.batch,
        steps=args.steps,
        rounds=args.rounds,
        overrides=tuple(args.overrides),
    )
    progress = Progress()
    try:
        results = overhead.measure(request, progress.now)
    finally:
        progress.close()
    print(overhead.table(request, results))
    keep_numbers(args.out, "overhead", overhead.numbers(request, results))
    return 0


def memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--presets",
        type=arguments.names(dict.fromkeys(PRESETS, "")),
        default="tiny,small",
        metavar="NAME,…",
        help="sizes",
    )
    parser.add_argument(
        "--lengths", type=arguments.lengths, default="512,2048", metavar="L,L,…", help="tokens per sequence"
    )
    for name, choices in (("attention", "favor,exact"), ("objectives", "causal,masked"), ("checkpointing", "no,yes")):
        known = dict.fromkeys(choices.split(","), "")
        parser.add_argument(
            f"--{name}", type=arguments.names(known), default=choices, metavar="NAME,…", help="one or both"
        )
    stages = dict.fromkeys(("single", "0", "1", "2", "3"), "")
    what = "ZeRO stages; single: without DeepSpeed"
    parser.add_argument("--zero-stages", type=arguments.names(stages), default="2", metavar="N,…", help=what)
    parser.add_argument("--batch", type=arguments.positive, default=1, metavar="N", help="sequences at a time")
    arguments.threads_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.precision=bf16")


def run_memory(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)
    check_folder(args.out)

    from longseq.benchmarks import training_memory

    request = training_memory.MemoryRequest(
        presets=args.presets,
        lengths=args.lengths,
        attention=args.attention,
        objectives=args.objectives,
        checkpointing=tuple(name == "yes" for name in args.checkpointing),
        zero_stages=args.zero_stages,
        batch=args.batch,
        overrides=tuple(args.overrides),
    )
    found: list[training_memory.CellResult] = []

    def note(result: training_memory.CellResult) -> None:
        found.append(result)
        print(training_memory.row(result), flush=True)

    print(training_memory.HEAD)
    code = 0
    try:
        training_memory.measure(request, note)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    good = sum(result.good for result in found)
    print(f"\n{good} of {len(found)} estimates within {training_memory.GOAL:.0%} of the measured peak of tensors")
    keep_numbers(args.out, "memory", training_memory.numbers(request, found))
    return code
