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
from longseq.commands.options import add_devices, add_model, add_overrides, given, ready
from longseq.evaluation.embed import embed_to_file
from longseq.trained_model import find


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
    how = given(args, "ema layer per_residue devices")
    written = embed_to_file(source, args.file, args.out, args.overrides, begin=ready, **how)
    print(f"longseq: {written:,} sequences × {source.spec.dim} written to {args.out}", file=sys.stderr)
    return 0
