"""Log-likelihoods of sequences, and the effects of mutations, under a model.

Causal: the exact log-likelihood of residues and end, one pass. Masked: the pseudo-log-likelihood, which hides each
position in turn and so costs L passes over a sequence of L (--passes 20 hides every 20th at once, in 20 passes).
With variants (A24G, or several changes A24G:C30D) the file holds the wild type alone, and the effect is the variant's
log-likelihood less the wild type's; masked models score the changed positions hidden (masked marginals), in one pass a
variant. Natural logarithms throughout.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.commands.numbers import natural
from longseq.commands.options import add_model, add_overrides, output, ready
from longseq.errors import LongseqError
from longseq.opening import Source, find

if TYPE_CHECKING:
    from longseq.evaluation.records import Record
    from longseq.evaluation.variants import Variant

Row = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("file", metavar="FILE", help="FASTA or text, as the model was trained on")
    add_overrides(parser)
    parser.add_argument("--variant", action="append", default=[], metavar="A24G", help="may be repeated")
    parser.add_argument("--variants", type=Path, metavar="FILE", help="one variant a line")
    parser.add_argument(
        "--passes", type=natural, default=0, metavar="N", help="of a masked model; default 0: one a position, exact"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table with tabs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")


def run(args: argparse.Namespace) -> int:
    source = find(args.target, args.overrides, ema=args.ema)
    if args.passes and (source.causal or args.variant or args.variants):
        what = "effects of variants take" if args.variant or args.variants else "a causal model takes"
        raise LongseqError(f"score: --passes, and {what} one pass each in any case: leave it out.")
    from longseq.evaluation.records import look

    look(source, args.file)
    rows = _variants(source, args) if args.variant or args.variants else _sequences(source, args)
    with output(args.out) as out:
        out.writelines(_json(rows) if args.json else _table(rows))
    return 0


def _sequences(source: Source, args: argparse.Namespace) -> Iterator[Row]:
    from longseq.evaluation.likelihood import causal, pseudo
    from longseq.evaluation.records import batches, records

    ready()
    model, vocabulary = source.load(), source.vocabulary
    for group in batches(records(source, args.file), lambda record: len(record.row)):
        if source.causal:
            scores = causal(model, vocabulary, [record.row for record in group])
        else:
            scores = [pseudo(model, vocabulary, record.row, args.passes) for record in group]
        for record, score in zip(group, scores, strict=True):
            targets = record.length + source.causal  # with the end
            mean = score / targets if targets else math.nan  # of a masked model that has nothing to predict
            yield {
                "id": record.identifier,
                "length": record.length,
                "log_likelihood" if source.causal else "pseudo_log_likelihood": score,
                "mean": mean,
                "perplexity": math.exp(min(-mean, 700.0)),
            }


def _variants(source: Source, args: argparse.Namespace) -> Iterator[Row]:
    from longseq.evaluation.records import records
    from longseq.evaluation.variants import read_variants

    if source.vocabulary.name != "protein":
        raise LongseqError(f"{source.folder}: a model of text; variants are those of proteins.")
    found = list(islice(records(source, args.file), 2))
    if len(found) != 1:
        raise LongseqError(
            f"{args.file}: more than one record, and variants are held against one wild type: give a FASTA of it alone."
        )
    (wild,) = found
    variants = read_variants(args.variant, args.variants, wild)
    return _effects(source, wild, variants)


def _effects(source: Source, wild: Record, variants: list[Variant]) -> Iterator[Row]:
    from longseq.evaluation.likelihood import effects

    ready()
    for variant, effect in effects(source.load(), source.vocabulary, wild, variants, source.causal):
        yield {"id": wild.identifier, "variant": variant.name, "changes": len(variant.changes), "effect": effect}


def _table(rows: Iterable[Row]) -> Iterator[str]:
    for number, row in enumerate(rows):
        if number == 0:
            yield "\t".join(row) + "\n"
        yield "\t".join(f"{value:.6f}" if isinstance(value, float) else str(value) for value in row.values()) + "\n"


def _json(rows: Iterable[Row]) -> Iterator[str]:
    """One array, an object a line, written as they come."""
    before = "[\n"
    for row in rows:
        yield before + json.dumps(row)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"
