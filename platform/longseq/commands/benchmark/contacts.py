"""Which residues touch, as far as a model knows: precision of its surest pairs, at L, L/2 and L/5.

FILE has a JSON object on each line: id, sequence, contacts (pairs of residues counted from 0). Ranges are separations
of 6 to 11 (short), 12 to 23 (medium), 24 and more (long), and all of them. From attention: a logistic regression on
the maps of all heads, read out with one-hot values, symmetric and corrected (APC), learned from 20 chains as for ESM
(Rao et al. 2021); every chain is tested by one that has not seen it. From the categorical Jacobian (Zhang et al.
2024): how much each residue changes the predictions of each other one; nothing is learned, and it takes 20 passes for
each residue.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.commands.numbers import natural, positive
from longseq.commands.options import add_devices, add_models, given, models_and_keys, ready, told
from longseq.config.benchmarks import METHODS
from longseq.printed import as_json

if TYPE_CHECKING:
    from longseq.evaluation.field.contacts import ContactBenchmark
    from longseq.evaluation.field.precision import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="chains, a JSON object on each line")
    add_models(parser)
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated; default: both")
    parser.add_argument("--train", type=positive, default=20, metavar="N", help="chains to learn from; default 20")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of who learns from whom; default 0")
    add_devices(parser)
    parser.add_argument("--json", action="store_true", help="JSON, with every chain, instead of a table")


def run(args: argparse.Namespace) -> int:
    from longseq.evaluation.field.contacts import benchmark_contacts

    targets, overrides = models_and_keys(args)
    ready()
    how = given(args, "train seed ema devices") | {"methods": args.method or METHODS, "progress": told}
    found = benchmark_contacts(args.file, targets, overrides, **how)
    print(as_json(found.as_dict(), indent=2) if args.json else "\n".join(_table(found)))
    return 0


def _table(found: ContactBenchmark) -> Iterator[str]:
    from longseq.evaluation.field.precision import RANGES, SHARES

    yield f"{found.chains} chains: precision of the L, L/2, L/5 surest pairs"
    width = max(len("model"), *(len(model.name) for model in found.models))
    head = "".join(f"{f'{name} {share}':>12}" for name in RANGES for share in SHARES)
    for objective in sorted({model.objective for model in found.models}, reverse=True):
        yield ""
        yield f"{objective} models"
        yield f"{'model':<{width}}  {'method':<10}{head}"
        for model in found.models:
            if model.objective == objective:
                for method, precision in model.precision.items():
                    yield f"{model.name:<{width}}  {method:<10}{_cells(precision)}"
    yield ""
    yield f"{'chance':<{width}}  {'':<10}{_cells(found.chance)}"


def _cells(precision: Precision) -> str:
    values = [value for by_share in precision.values() for value in by_share.values()]
    return "".join(f"{'–' if value != value else f'{value:.3f}':>12}" for value in values)
