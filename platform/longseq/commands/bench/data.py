"""``data``: how fast batches come."""

from __future__ import annotations

import argparse
import sys

from longseq.commands.bench import arguments
from longseq.commands.bench.output import check_folder, keep_numbers
from longseq.errors import LongseqError


def data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE", help="FASTA to read instead of synthetic")
    parser.add_argument("--megabytes", type=arguments.positive, default=320, metavar="N", help="of synthetic FASTA")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, metavar="N", help="times each contender is timed"
    )
    parser.add_argument(
        "--seconds",
        type=arguments.above_zero,
        default=2.0,
        metavar="S",
        help="of reading from a corpus, each time: it has no end",
    )
    parser.add_argument("--contenders", default="", metavar="NAME,…", help="some of them; empty: all")


def run_data(args: argparse.Namespace) -> int:
    check_folder(args.out)

    from longseq.benchmarks import data
    from longseq_data.readers.sources import expand_sources

    names = tuple(name.strip() for name in args.contenders.split(",") if name.strip()) or tuple(data.CONTENDERS)
    for name in names:
        if name not in data.CONTENDERS:
            raise LongseqError(f"--contenders: {name!r} is not one of {', '.join(data.CONTENDERS)}.")
    request = data.DataRequest(
        folder=args.out,
        files=tuple(expand_sources(args.files)),
        megabytes=args.megabytes,
        rounds=args.rounds,
        seconds=args.seconds,
        contenders=names,
    )
    results = data.measure(request, lambda text: print(text, file=sys.stderr, flush=True))
    print(data.table(results))
    keep_numbers(args.out, "data", data.numbers(request, results))
    return 0
