"""Embeddings of sequences: the mean over each (or --pool), and with --per-residue a vector for every residue.

Sequences stream through, so memory does not depend on their number, nor, without --per-residue, on their length. What
is finished is kept in .FILE.shards next to FILE until that is whole: the same command goes on where it was killed. In
Parquet: columns id, length, mean, residues. In npz: arrays ids, length, mean, residues, the last record after record.
With --pool max they are called max, with --layers 1,last mean_1, mean_last, residues_1 and residues_last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from longseq.commands.numbers import natural
from longseq.commands.options import add_devices, add_model, add_overrides, end_well, given, ready
from longseq.evaluation.embed import embed_to_file
from longseq.evaluation.vector_options import DTYPES, IDS, POOLS
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
    parser.add_argument(
        "--layers", type=_layers, metavar="K,K,...", help="several of them; last: after the final norm, e.g. 0,3,last"
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        default=POOLS[0],
        help="a sequence's vector: mean or max over its residues, or, of masked models, that of the token before them "
        "(default mean)",
    )
    parser.add_argument(
        "--ids",
        choices=IDS,
        default=IDS[0],
        help="as they are, or the second of an id x called x.2, or x.3 where the file has an x.2 (default given)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the numbers (default float32)")


def _layers(text: str) -> tuple[int | None, ...]:
    return tuple(None if part == "last" else natural(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    source = find(args.target, args.overrides, ema=args.ema)
    how = given(args, "ema layer layers pool dtype per_residue ids devices")
    begin = ready if args.devices == 1 else end_well  # who deals out the work needs no torch, and begins sooner
    written = embed_to_file(source, args.file, args.out, args.overrides, begin=begin, **how)
    print(f"longseq: {written:,} sequences × {source.spec.dim} written to {args.out}", file=sys.stderr)
    return 0
