"""``data``: how fast batches come."""

from __future__ import annotations

import argparse
import sys

from longseq.benchmarks.request import DataSizes
from longseq.commands.bench import arguments
from longseq.commands.bench.output import check_folder, keep
from longseq.errors import LongseqError


def data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE", help="FASTA to read instead of synthetic")
    arguments.add_fields(parser, DataSizes)
    parser.add_argument("--contenders", default="", metavar="NAME,…", help="some of them; empty: all")


def run_data(args: argparse.Namespace) -> int:
    check_folder(args.out)

    from longseq.benchmarks import data
    from longseq_data.readers.sources import expand_sources

    names = tuple(name.strip() for name in args.contenders.split(",") if name.strip()) or tuple(data.CONTENDERS)
    for name in names:
        if name not in data.CONTENDERS:
            raise LongseqError(f"--contenders: {name!r} is not one of {', '.join(data.CONTENDERS)}.")
    files = tuple(expand_sources(args.files))
    request = arguments.asked(data.DataRequest, args, folder=args.out, files=files, contenders=names)
    results = data.measure(request, lambda text: print(text, file=sys.stderr, flush=True))
    print(data.table(results))
    keep(args.out, "data", data.numbers(request, results))
    return 0
