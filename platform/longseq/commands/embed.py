"""Embeddings of sequences: the mean over each, and with --per-residue a vector for every residue.

Sequences stream through, so memory does not depend on their number. The file has its name when it is whole. In Parquet:
columns id, length, mean, residues. In npz: arrays ids, length, mean, residues, the last record after record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.commands.numbers import natural
from longseq.commands.options import add_model, add_overrides, output_file, ready
from longseq.errors import LongseqError
from longseq.evaluation.embed import embed
from longseq.opening import find

_SUFFIXES = (".parquet", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("file", metavar="FILE", help="FASTA or text, as the model was trained on")
    add_overrides(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .parquet or .npz file")
    parser.add_argument("--per-residue", action="store_true", help="a vector for every residue as well")
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
    embedded = embed(source, args.file, layer=args.layer)

    from longseq.evaluation.vectors import write_npz, write_parquet

    write = write_parquet if args.out.suffix == ".parquet" else write_npz
    width = source.spec.dim
    with output_file(args.out) as partial:
        ready()
        written = write(embedded, partial, width, args.per_residue)
    print(f"longseq: {written:,} sequences × {width} written to {args.out}", file=sys.stderr)
    return 0
