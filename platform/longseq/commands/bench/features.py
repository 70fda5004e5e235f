"""``features``: the quality of the estimators."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from longseq.benchmarks.request import FeaturesRequest
from longseq.commands.bench import arguments
from longseq.commands.bench.output import Progress, check_folder, keep


def features_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_fields(parser, FeaturesRequest)
    arguments.threads_argument(parser)


def run_features(args: argparse.Namespace) -> int:
    arguments.set_threads(args.threads)

    from longseq.benchmarks import features, sharper

    check_folder(args.out)
    with Progress() as progress:
        progress.now("estimators next to their closed forms")
        estimators = features.measure_estimators(draws=args.draws, seed=args.seed)
        progress.now("attention error against the number of features")
        errors = features.measure_attention_error(length=args.length, draws=args.repeats, seed=args.seed)
        progress.now("features that fit the queries and keys")
        sharp = sharper.measure_sharpness(repeats=args.repeats, seed=args.seed)
    print(features.table(estimators, errors), sharper.table(sharp), sep="\n\n")
    rows = features.as_dict(estimators, errors) | {"sharper": [asdict(one) for one in sharp]}
    keep(args.out, "features", dict(rows), lambda: features.figure(errors))
    return 0
