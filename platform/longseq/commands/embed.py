"""Embeddings of sequences: the mean over each, and with --per-residue a vector for every residue.

Sequences stream through, so memory does not depend on their number, nor, without --per-residue, on their length. What
is finished is kept in .FILE.shards next to FILE until that is whole: the same command goes on where it was killed. In
Parquet: columns id, length, mean, residues. In npz: arrays ids, length, mean, residues, the last record after record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.commands.numbers import natural
from longseq.commands.options import add_devices, add_model, add_overrides, check_output, output_file, ready
from longseq.errors import LongseqError
from longseq.evaluation.embed import embedding
from longseq.evaluation.records import look
from longseq.evaluation.shards import kept, results
from longseq.opening import find

_SUFFIXES = (".parquet", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("file", metavar="FILE", help="FASTA or text, as the model was trained on")
    add_overrides(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .parquet or .npz file")
    parser.add_argument("--per-residue", action="store_true", help="a vector for every residue as well")
    add_devices(parser)
    parser.add_argument(
        "--layer",
        type=natural,
        metavar="K",
        help="0: the embedding, K: after block K; default: after the final norm, what the head reads",
    )


def run(args: argparse.Namespace) -> int:
    source = find(args.target, args.overrides, ema=args.ema)
    if args.out.suffix not in _SUFFIXES:
        raise LongseqError(
            f"--out {args.out}: embeddings are written to .parquet or .npz; give it one of these endings."
        )
    job = embedding(source, args.file, args.overrides, ema=args.ema, layer=args.layer, per_residue=args.per_residue)
    check_output(args.out, args.file)
    look(source, args.file)

    from longseq.evaluation.vectors import write_npz, write_parquet
    from longseq.evaluation.work import Vectors

    write = write_parquet if args.out.suffix == ".parquet" else write_npz
    work, place = Vectors(job, source), args.out.with_name(f".{args.out.name}.shards")
    # The shards go after the file has its name: whenever it is killed, one of the two is there.
    with kept(place, work), output_file(args.out) as partial:
        ready()
        written = write(results(place, work, args.devices), partial, source.spec.dim, args.per_residue)
    print(f"longseq: {written:,} sequences × {source.spec.dim} written to {args.out}", file=sys.stderr)
    return 0
