"""Write protein families in UniRef's format, evolved from random ancestors, for a first training without a network.

The same arguments give the same sequences. Members of one family fall on both sides of the held-out split; another
--seed gives other families: an out-of-distribution file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="FASTA file to write; gzipped if its name ends in .gz")
    parser.add_argument("--families", type=int, default=64, help="unrelated families (default: %(default)s)")
    parser.add_argument(
        "--records", type=int, default=4000, help="sequences in all families together (default: %(default)s)"
    )
    parser.add_argument(
        "--mean-length", type=int, default=330, help="residues of an ancestor, on average (default: %(default)s)"
    )
    parser.add_argument("--min-length", type=int, default=30, help="shortest sequence (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=2000, help="longest sequence (default: %(default)s)")
    parser.add_argument(
        "--divergence", type=float, default=0.35, help="substitutions a site since the ancestor (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other families (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

    spec = SyntheticSpec(
        families=args.families,
        records=args.records,
        seed=args.seed,
        mean_length=args.mean_length,
        min_length=args.min_length,
        max_length=args.max_length,
        divergence=args.divergence,
    )
    with tqdm(total=spec.records, unit=" records", disable=not sys.stderr.isatty(), leave=False) as bar:
        report = write_fasta(spec, args.file, overwrite=args.overwrite, progress=lambda done: bar.update(done - bar.n))
    print(f"{args.file}: {report.records:,} records of {report.families:,} families, {report.residues:,} residues")
    return 0
