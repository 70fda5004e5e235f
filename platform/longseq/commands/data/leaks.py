"""Search the test and valid records of a prepared corpus among those of train, with MMseqs2.

Says how many have a relative there: at least 30, 50 and 90 % of the aligned residues the same, over at least --coverage
of the held-out record. Exit codes: 0 no record has one at 30 %; 3 some have; 1 an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longseq.errors import ConfigError
from longseq.printed import as_json

LEAKS = 3  # the exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=Path, help="the folder of a prepared corpus")
    parser.add_argument(
        "--coverage", type=float, default=0.8, help="share of a held-out record that is aligned (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one for each core (default)")
    parser.add_argument("--memory-mb", type=int, default=2048, help="as a guide, MiB (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from longseq.commands.data.progress import Bar
    from longseq.runs.run import as_typed
    from longseq_data.prepare.config import PrepareConfig
    from longseq_data.prepare.leaks import find_leaks

    if not 0 < args.coverage <= 1:
        raise ConfigError(f"--coverage {args.coverage}: take a share above 0, and at most 1.")
    if args.workers < 0:
        raise ConfigError(f"--workers {args.workers}: take 0 or more.")
    with Bar({"searches": ("searching", " splits")}) as bar:
        found = find_leaks(
            args.corpus,
            coverage=args.coverage,
            threads=PrepareConfig(workers=args.workers).processes,
            memory_mb=args.memory_mb,
            progress=bar,
        )
    if args.json:
        splits = {
            leaks.split: {"records": leaks.records, "related": leaks.related, "nearest": leaks.nearest}
            for leaks in found
        }
        print(as_json({"corpus": str(args.corpus.absolute()), "coverage": args.coverage, "splits": splits}))
    else:
        print(f"{as_typed(args.corpus.absolute())}: relatives in train over at least {args.coverage:.0%} of a record")
        for leaks in found:
            shares = ", ".join(
                f"{count:,} ({100 * count / leaks.records:.1f} %) at {percent} %"
                for percent, count in leaks.related.items()
            )
            print(f"  {leaks.split:<6} {leaks.records:,} records: {shares}")
            if leaks.nearest:
                record, relative, identity = leaks.nearest
                print(f"         the nearest: {record} and {relative}, {identity:.1%} identical")
    return LEAKS if any(count for leaks in found for count in leaks.related.values()) else 0
