"""``features``: the quality of the estimators."""

from __future__ import annotations

import argparse

from longseq.benchmarks.request import FeaturesRequest
from longseq.commands.bench import arguments
from longseq.commands.bench.output import Progress, check_folder, keep


def features_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_fields(parser, FeaturesRequest)
    arguments.threads_argument(parser)


def run_features(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import features

    check_folder(args.out)
    with Progress() as progress:
        progress.now("estimators next to their closed forms")
        estimators = features.measure_estimators(draws=args.draws, seed=args.seed)
        progress.now("attention error against the number of features")
        errors = features.measure_attention_error(length=args.length, draws=args.repeats, seed=args.seed)
    print(features.table(estimators, errors))
    keep(args.out, "features", dict(features.as_dict(estimators, errors)), lambda: features.figure(errors))
    return 0
