"""Measure this machine: speed and memory against the length, side by side with the exact Transformer and peers.

Every benchmark prints a table, and keeps every raw number as JSON in a folder (--out): attention, step, context and
features next to a picture, which needs matplotlib (pip install 'longseq[bench]'); quality and recall in one file per
model. Ctrl-C keeps what was measured until then, but for overhead, features, needle and data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longseq.commands.bench import context, data, features, gpu, learning, lengths, training
from longseq.errors import LongseqError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: what it does, its options, and what runs it."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default in ("", [])
        return action.help if none else super()._get_help_string(action)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        child = benchmarks.add_parser(
            name,
            help=benchmark.about,
            description=f"{benchmark.about[0].upper()}{benchmark.about[1:]}.",
            formatter_class=_Formatter,
        )
        benchmark.add_arguments(child)
        child.add_argument("--out", type=Path, default=Path("bench", name), metavar="DIR", help="folder of the results")
        child.set_defaults(act=benchmark.run)


def run(args: argparse.Namespace) -> int:
    try:
        return args.act(args)
    except ValueError as error:  # attention options that exclude each other
        raise LongseqError(f"{error}.") from None


# Another benchmark is a row here, its arguments and its function.
BENCHMARKS: dict[str, Benchmark] = {
    "attention": Benchmark(
        "time and memory of an attention call against the length", lengths.attention_arguments, lengths.run_attention
    ),
    "step": Benchmark(
        "time and memory of a training step against the length", lengths.step_arguments, lengths.run_step
    ),
    "quality": Benchmark(
        "held-out loss of a small model with each kind of attention", learning.quality_arguments, learning.run_quality
    ),
    "recall": Benchmark(
        "associative recall at distances beyond the window", learning.recall_arguments, learning.run_recall
    ),
    "needle": Benchmark(
        "what only a long context can know: values asked for 100,000 tokens later",
        context.needle_arguments,
        context.run_needle,
    ),
    "context": Benchmark(
        "a sequence in slices on several processes: time, memory, bytes sent, and a model for GPUs",
        context.context_arguments,
        context.run_context,
    ),
    "data": Benchmark(
        "how fast data come: streamed and prepared, next to decompression alone", data.data_arguments, data.run_data
    ),
    "memory": Benchmark(
        "the memory estimate next to what two steps take", training.memory_arguments, training.run_memory
    ),
    "overhead": Benchmark(
        "a training step and a checkpoint next to a bare loop", training.overhead_arguments, training.run_overhead
    ),
    "features": Benchmark(
        "error of the random features, next to their closed forms", features.features_arguments, features.run_features
    ),
    "gpu": Benchmark(
        "a GPU in minutes: every kernel, training and bar, each part in a process of its own",
        gpu.gpu_arguments,
        gpu.run_gpu,
    ),
}
