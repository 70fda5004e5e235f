"""Train small models of a configuration's family, and predict what the configuration itself will reach.

The learning rate is that of the smallest width; the others have it by µP (optim.base_dim). Each rung is a run in
ladders/NAME/runs. Interrupted, the same command goes on.

  longseq ladder protein/base data.train=proteins.fasta.gz --rates 0.001,0.002,0.004
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.commands.numbers import natural, naturals, real
from longseq.commands.options import add_overrides
from longseq.errors import EXIT_GO_ON
from longseq.printed import as_json


def _reals(text: str) -> tuple[float, ...]:
    return tuple(real(word) for word in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or a name of `longseq configs`: the largest size"
    )
    add_overrides(parser)
    parser.add_argument(
        "--sizes",
        type=naturals,
        default=(),
        metavar="N,…",
        help="weights of the rungs; default: four widths below CONFIG's",
    )
    parser.add_argument(
        "--tokens-per-parameter",
        type=_reals,
        default=(5.0, 10.0, 20.0),
        metavar="T,…",
        help="budgets of each size; default 5,10,20",
    )
    parser.add_argument(
        "--rates", type=_reals, default=(), metavar="LR,…", help="tried at the smallest size; default: optim.lr alone"
    )
    parser.add_argument("--seeds", type=naturals, default=(0,), metavar="N,…", help="run.seed of each rung; default 0")
    parser.add_argument(
        "--sequences",
        type=natural,
        default=1024,
        metavar="N",
        help="scored of the validation split; default 1024, 0: all",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs and results go; default: ladders/NAME")
    parser.add_argument("--verify", action="store_true", help="train CONFIG's size, too, and compare")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    from longseq.experiments.ladder import ladder
    from longseq.experiments.ladder_report import draw, table
    from longseq.experiments.running import Interrupted

    try:
        found = ladder(
            args.config,
            args.overrides,
            sizes=args.sizes,
            tokens_per_parameter=args.tokens_per_parameter,
            rates=args.rates,
            seeds=args.seeds,
            sequences=args.sequences or None,
            out=args.out,
            verify=args.verify,
            tell=lambda line: print(f"ladder  {line}", file=sys.stderr, flush=True),
        )
    except Interrupted:
        print("longseq: interrupted: what is finished is kept; the same command goes on.", file=sys.stderr)
        return EXIT_GO_ON
    text = table(found)
    (found.folder / "table.md").write_text(text, encoding="utf-8")
    print(as_json(found.as_dict(), indent=2) if args.json else text)
    picture = draw(found)
    print(f"kept in {found.folder}{'' if picture else ' (no picture: pip install longseq[figures])'}", file=sys.stderr)
    return 0
