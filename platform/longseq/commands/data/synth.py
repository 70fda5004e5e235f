"""Write protein families in UniRef's format, evolved from random ancestors, for a first training without a network.

The same arguments give the same sequences. Members of one family fall on both sides of the held-out split; another
--seed gives other families: an out-of-distribution file.

With --contacts families are drawn from Potts models instead, whose planted couplings are contacts: FILE.contacts.jsonl
has sequences with the contacts that `longseq benchmark contacts` should find.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from longseq.errors import LongseqError

_EVOLVED = {"mean_length": 330, "min_length": 30, "max_length": 2000, "divergence": 0.35}
_PLANTED = {"length": 40, "coupling": 0.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="FASTA file to write; gzipped if its name ends in .gz")
    parser.add_argument("--families", type=int, help="unrelated families (default: 64; with --contacts 1)")
    parser.add_argument(
        "--records", type=int, default=4000, help="sequences in all families together (default: %(default)s)"
    )
    parser.add_argument("--mean-length", type=int, help="residues of an ancestor, on average (default: 330)")
    parser.add_argument("--min-length", type=int, help="shortest sequence (default: 30)")
    parser.add_argument("--max-length", type=int, help="longest sequence (default: 2000)")
    parser.add_argument("--divergence", type=float, help="substitutions a site since the ancestor (default: 0.35)")
    parser.add_argument("--contacts", action="store_true", help="plant contacts: families of Potts models")
    parser.add_argument("--length", type=int, help="with --contacts: residues of every sequence (default: 40)")
    parser.add_argument(
        "--coupling", type=float, help="with --contacts: mean strength of the planted couplings (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other families (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    own, others = (_PLANTED, _EVOLVED) if args.contacts else (_EVOLVED, _PLANTED)
    for name in others:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            if args.contacts:
                raise LongseqError(f"{option} and --contacts: leave one of them out; its families are of one --length.")
            raise LongseqError(f"{option} needs --contacts, which draws families of Potts models: add it.")
    values = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in own.items()}
    return _planted(args, values) if args.contacts else _evolved(args, values)


def _evolved(args: argparse.Namespace, values: dict[str, Any]) -> int:
    from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

    families = 64 if args.families is None else args.families
    spec = SyntheticSpec(families=families, records=args.records, seed=args.seed, **values)
    with _bar(spec.records) as bar:
        report = write_fasta(spec, args.file, overwrite=args.overwrite, progress=lambda done: bar.update(done - bar.n))
    print(f"{args.file}: {report.records:,} records of {report.families:,} families, {report.residues:,} residues")
    return 0


def _planted(args: argparse.Namespace, values: dict[str, Any]) -> int:
    from longseq_data.synth.potts import PottsSpec, precision, write

    families = 1 if args.families is None else args.families
    spec = PottsSpec(families=families, records=args.records, seed=args.seed, **values)
    with _bar(spec.records) as bar:
        records, residues, truth = write(
            spec, args.file, overwrite=args.overwrite, progress=lambda done: bar.update(done - bar.n)
        )
    print(f"{args.file}: {records:,} records of {families:,} families, {residues:,} residues")
    print(f"{truth}: their contacts; the true parameters find {precision(spec):.1%} of them among as many pairs")
    return 0


def _bar(records: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=records, unit=" records", disable=not sys.stderr.isatty(), leave=False)
