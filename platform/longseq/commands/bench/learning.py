"""``quality`` and ``recall``: what the attention variants learn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.benchmarks.variants import VARIANTS
from longseq.commands.bench import arguments
from longseq.commands.bench.output import EXIT_INTERRUPTED, Progress
from longseq.errors import LongseqError


def quality_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text; each one's last tenth is held out"
    )
    _training_arguments(parser, window=64, features=128)
    parser.add_argument(
        "--seeds", type=arguments.naturals, default="0", metavar="N,…", help="one model per seed and variant"
    )
    parser.add_argument("--length", type=arguments.positive, default=512, metavar="L", help="characters per sequence")
    parser.add_argument("--batch", type=arguments.positive, default=8, metavar="N", help="sequences per step")
    parser.add_argument("--steps", type=arguments.positive, default=1000, metavar="N", help="optimiser steps")


def run_quality(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import quality

    request = quality.QualityRequest(
        length=args.length, batch=args.batch, steps=args.steps, window=args.window, features=args.features
    )
    text = quality.read_text(args.text)
    progress = Progress()
    try:
        quality.measure(request, text, args.variants, args.seeds, args.out / "trials", progress.now)
    except KeyboardInterrupt:
        print(
            "longseq: interrupted: the models that were finished are kept; the same command goes on.", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    found = quality.trials(request, text, args.out / "trials")
    print(quality.table(request, found))
    return 0


def recall_arguments(parser: argparse.ArgumentParser) -> None:
    _training_arguments(parser, window=32, features=128)
    parser.add_argument(
        "--seed", type=arguments.natural, default=0, metavar="N", help="of weights, projections and sequences"
    )
    parser.add_argument(
        "--distances",
        type=arguments.lengths,
        default="64,256,1024,2048",
        metavar="L,L,…",
        help="between answer and question",
    )
    parser.add_argument(
        "--steps", type=arguments.positive, default=2500, metavar="N", help="at most, at the first distance"
    )
    more = "at most, at each further distance"
    parser.add_argument("--more-steps", type=arguments.positive, default=300, metavar="N", help=more)


def run_recall(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import recall

    request = recall.RecallRequest(
        distances=args.distances,
        steps=args.steps,
        more_steps=args.more_steps,
        window=args.window,
        features=args.features,
    )
    if min(request.distances) < request.pairs:
        raise LongseqError(f"--distances {min(request.distances)}: {request.pairs} pairs need at least as many.")
    progress = Progress()
    try:
        found = recall.measure(request, args.variants, args.seed, args.out / "trials", progress.now)
    except KeyboardInterrupt:
        print(
            "longseq: interrupted: the variants that were finished are kept; the same command goes on.", file=sys.stderr
        )
        return EXIT_INTERRUPTED
    finally:
        progress.close()
    print(recall.table(request, found))
    return 0


def _training_arguments(parser: argparse.ArgumentParser, *, window: int, features: int) -> None:
    parser.add_argument(
        "--variants",
        type=arguments.names({name: variant.about for name, variant in VARIANTS.items()}),
        default="exact,local,softmax,relu,window,window-relu,window-share-decay",
        metavar="NAME,…",
        help="; ".join(f"{name}: {variant.about}" for name, variant in VARIANTS.items()),
    )
    parser.add_argument(
        "--window", type=arguments.positive, default=window, metavar="W", help="of the variants that have one"
    )
    parser.add_argument("--features", type=arguments.positive, default=features, metavar="M", help="random features")
    arguments.threads_argument(parser)
