"""Measure this machine: speed and memory against the length, side by side with the exact Transformer and peers.

Every benchmark prints a table, and keeps every raw number as JSON in a folder (--out): attention, step, context and
features next to a picture, which needs matplotlib (pip install 'longseq[bench]'); quality and recall in one file per
model. Ctrl-C keeps what was measured until then, but for overhead, features, needle and data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

from longseq.commands.bench import context, data, features, gpu, learning, lengths, training
from longseq.errors import LongseqError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default in ("", [])
        return action.help if none else super()._get_help_string(action)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (about, module) in BENCHMARKS.items():
        title = f"{about[0].upper()}{about[1:]}."
        child = benchmarks.add_parser(name, help=about, description=title, formatter_class=_Formatter)
        getattr(module, f"{name}_arguments")(child)
        child.add_argument("--out", type=Path, default=Path("bench", name), metavar="DIR", help="folder of the results")
        child.set_defaults(act=getattr(module, f"run_{name}"))


def run(args: argparse.Namespace) -> int:
    try:
        return args.act(args)
    except ValueError as error:  # attention options that exclude each other
        raise LongseqError(f"{error}.") from None


# What each measures, and the module with its NAME_arguments(parser) and run_NAME(args).
BENCHMARKS: dict[str, tuple[str, ModuleType]] = {
    "attention": ("time and memory of an attention call against the length", lengths),
    "step": ("time and memory of a training step against the length", lengths),
    "quality": ("held-out loss of a small model with each kind of attention", learning),
    "recall": ("associative recall at distances beyond the window", learning),
    "needle": ("what only a long context can know: values asked for 100,000 tokens later", context),
    "context": ("a sequence in slices on several processes: time, memory, bytes sent, and a model for GPUs", context),
    "data": ("how fast data come: streamed and prepared, next to decompression alone", data),
    "memory": ("the memory estimate next to what two steps take", training),
    "overhead": ("a training step and a checkpoint next to a bare loop", training),
    "watching": ("what heartbeats, straggler statistics and copies in memory cost a step", training),
    "features": ("error of the random features, next to their closed forms", features),
    "gpu": ("a GPU in minutes: every kernel, training and bar, each part in a process of its own", gpu),
}
