"""``features``: the quality of the estimators."""

from __future__ import annotations

import argparse

from longseq.commands.bench import arguments
from longseq.commands.bench.output import Progress, check_folder, keep


def features_arguments(parser: argparse.ArgumentParser) -> None:
    draws = "projection matrices for an estimator's error"
    parser.add_argument("--draws", type=arguments.positive, default=100_000, metavar="N", help=draws)
    parser.add_argument("--length", type=arguments.positive, default=4096, metavar="L", help="length of the attention")
    repeats = "draws of inputs and projections for the attention's error"
    parser.add_argument("--repeats", type=arguments.positive, default=5, metavar="N", help=repeats)
    parser.add_argument("--seed", type=arguments.natural, default=0, metavar="N", help="of all of it")
    arguments.threads_argument(parser)


def run_features(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import features

    check_folder(args.out)
    progress = Progress()
    progress.now("estimators next to their closed forms")
    estimators = features.measure_estimators(draws=args.draws, seed=args.seed)
    progress.now("attention error against the number of features")
    errors = features.measure_attention_error(length=args.length, draws=args.repeats, seed=args.seed)
    progress.close()
    print(features.table(estimators, errors))
    print()
    keep(args.out, "features", dict(features.as_dict(estimators, errors)), lambda: features.figure(errors))
    return 0
