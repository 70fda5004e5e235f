"""Log-likelihoods of sequences, and the effects of mutations, under a model.

Causal: the exact log-likelihood of residues and end, one pass. Masked: the pseudo-log-likelihood, which hides each
position in turn and so costs L passes over a sequence of L (--passes 20 hides every 20th at once, in 20 passes). With
variants (A24G, or several changes A24G:C30D) the file holds the wild type alone, and the effect is the variant's
log-likelihood less the wild type's; masked models score the changed positions hidden (masked marginals), in one pass
for all variants of the same positions. Of a deep mutational scan as ProteinGym has them (a CSV with the columns mutant
and DMS_score) the rank correlation is printed, too, on stderr. With --context a causal model reads relatives first, as
one that was trained with data.packing=family did. Natural logarithms throughout.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from longseq.commands.numbers import natural
from longseq.commands.options import add_context, add_devices, add_direction, add_model, add_overrides, ready
from longseq.errors import LongseqError
from longseq.evaluation.score import SequenceScore, VariantEffect, score, variant_effects
from longseq.output_files import output
from longseq.printed import as_json

Row = SequenceScore | VariantEffect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("file", metavar="FILE", help="FASTA or text, as the model was trained on")
    add_overrides(parser)
    parser.add_argument("--variant", action="append", default=[], metavar="A24G", help="may be repeated")
    parser.add_argument(
        "--variants", type=Path, metavar="FILE", help="one variant per line, or a scan: CSV with mutant, DMS_score"
    )
    parser.add_argument(
        "--passes", type=natural, default=0, metavar="N", help="of a masked model; default 0: one per position, exact"
    )
    add_direction(parser)
    add_context(parser)
    parser.add_argument(
        "--context-orders",
        type=natural,
        default=1,
        metavar="N",
        help="draw and order the relatives N times; the score is the mean (default: 1)",
    )
    add_devices(parser)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table with tabs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")


def run(args: argparse.Namespace) -> int:
    rows: Iterator[Row]
    behind = {
        "direction": args.direction,
        "context": args.context,
        "context_tokens": args.context_tokens,
        "context_orders": args.context_orders,
    }
    pairs: list[tuple[float, float]] = []  # effect, DMS_score
    if args.variant or args.variants:
        if args.passes:
            raise LongseqError(
                "--passes: effects of variants take a pass per set of positions in any case: leave it out."
            )
        found = variant_effects(
            *(args.target, args.file, args.variant, args.variants, args.overrides),
            ema=args.ema,
            devices=args.devices,
            **behind,
        )
        rows = _noted(found, pairs)
    else:
        several = {"passes": args.passes, "devices": args.devices}
        rows = score(args.target, args.file, args.overrides, ema=args.ema, **several, **behind)
    ready()
    with output(args.out, args.file, args.variants, args.context) as out:
        out.writelines(_json(rows) if args.json else _table(rows))
    if pairs:
        import numpy as np

        from longseq.evaluation.field.measures import spearman

        effects, measured = np.array(pairs).T
        rho = spearman(effects, measured)
        said = f"Spearman {rho:.4f} with DMS_score"
        if math.isnan(rho):
            said = "no Spearman with DMS_score, as one of the two is constant"
        print(f"longseq: {args.variants}: {len(pairs):,} variants, {said}", file=sys.stderr)
    return 0


def _noted(rows: Iterable[VariantEffect], pairs: list[tuple[float, float]]) -> Iterator[VariantEffect]:
    for row in rows:
        if row.measured is not None:
            pairs.append((row.effect, row.measured))
        yield row


def _table(rows: Iterable[Row]) -> Iterator[str]:
    for number, row in enumerate(each.as_dict() for each in rows):
        if number == 0:
            yield "\t".join(row) + "\n"
        yield "\t".join(f"{value:.6f}" if isinstance(value, float) else str(value) for value in row.values()) + "\n"


def _json(rows: Iterable[Row]) -> Iterator[str]:
    """One array, an object a line, written as they come."""
    before = "[\n"
    for row in rows:
        yield before + as_json(row.as_dict())
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"
