"""``quality`` and ``recall``: what the attention variants learn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.benchmarks.request import QualityRequest, RecallRequest, Variants
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress
from longseq.commands.numbers import natural, naturals
from longseq.errors import LongseqError


def quality_arguments(parser: argparse.ArgumentParser) -> None:
    held_out = "UTF-8 text; each one's last tenth is held out"
    parser.add_argument("text", nargs="+", type=Path, metavar="FILE", help=held_out)
    seeds = "one model per seed and variant"
    parser.add_argument("--seeds", type=naturals, default="0", metavar="N,…", help=seeds)
    _model_arguments(parser, QualityRequest)


def run_quality(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import quality

    request, text = arguments.asked(QualityRequest, args), quality.read_text(args.text)
    with Progress() as progress:
        try:
            quality.measure(request, text, args.variants, args.seeds, args.out / "trials", progress.now)
        except KeyboardInterrupt:
            return _interrupted("models")
    print(quality.table(request, quality.trials(request, text, args.out / "trials")))
    return 0


def recall_arguments(parser: argparse.ArgumentParser) -> None:
    seed = "of weights, projections and sequences"
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help=seed)
    _model_arguments(parser, RecallRequest)


def run_recall(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import recall

    request = arguments.asked(RecallRequest, args)
    if min(request.distances) < request.pairs:
        raise LongseqError(f"--distances {min(request.distances)}: {request.pairs} pairs need at least as many.")
    with Progress() as progress:
        try:
            found = recall.measure(request, args.variants, args.seed, args.out / "trials", progress.now)
        except KeyboardInterrupt:
            return _interrupted("variants")
    print(recall.table(request, found))
    return 0


def _model_arguments(parser: argparse.ArgumentParser, request: type) -> None:
    arguments.add_fields(parser, Variants)
    arguments.add_fields(parser, request)
    arguments.threads_argument(parser)


def _interrupted(what: str) -> int:
    print(f"longseq: interrupted: the {what} that were finished are kept; the same command goes on.", file=sys.stderr)
    return EXIT_INTERRUPTED
