"""Write new sequences with a causal model, fill in masked positions with a masked one, or a gap with one of both sides.

Each token costs the same however many went before: the model carries a state of fixed size. A sequence is a function
of the model, the options, the seed and its number, so --number 100 begins with the sequences of --number 10.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from longseq.commands.numbers import natural, positive, real, share
from longseq.commands.options import add_context, add_model, add_overrides, ready, told
from longseq.errors import LongseqError
from longseq.evaluation.sample import infill, sample
from longseq.output_files import output
from longseq.trained_model import Source, find
from longseq_data.vocabulary import ALPHABETS

_GAP = "<gap>"
_LINE = 60  # residues per line of FASTA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_overrides(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what every sequence begins with")
    add_context(parser)
    parser.add_argument("--length", type=positive, metavar="N", help="tokens to draw at most; default 512")
    parser.add_argument("--number", type=positive, metavar="N", help="sequences; default 1")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="default 0")
    parser.add_argument(
        "--temperature", type=real, metavar="T", help="default 1, with --infill 0; 0: the most probable token"
    )
    parser.add_argument("--top-k", type=natural, default=0, metavar="K", help="only the K most probable; 0: all")
    parser.add_argument(
        "--top-p", type=share, default=1.0, metavar="P", help="only the most probable ones that make up P; 1: all"
    )
    parser.add_argument(
        "--infill",
        metavar="FASTA|TEXT",
        help="with a masked model: fill in the positions of a FASTA file written as '?'; with one of model.objective "
        f"fim: a text with one {_GAP}, in whose place something is written, of any length: 'MK{_GAP}LV'",
    )
    parser.add_argument(
        "--rounds",
        type=natural,
        metavar="N",
        help="passes of --infill, the surest positions first; 1: all at once; default 0: one per position",
    )
    parser.add_argument(
        "--timing", action="store_true", help="draw --length tokens whatever they are, and say how long each took"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="FASTA or text; default: standard output")


def run(args: argparse.Namespace) -> int:
    source = find(args.target, args.overrides, ema=args.ema)
    suffix = None
    if args.infill and source.config.model.objective == "fim":
        args.prompt, suffix = _around(args)
        args.infill = None
    _refuse_what_has_no_effect(args)
    how = {"top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if args.temperature is not None:
        how["temperature"] = args.temperature
    if args.infill:
        return _infill(source, args, how)
    clock: list[float] | None = [] if args.timing else None
    length = args.length or 512
    how |= {"context": args.context, "context_tokens": args.context_tokens}
    how |= {"suffix": suffix}
    samples = sample(source, prompt=args.prompt, number=args.number or 1, length=length, clock=clock, **how)
    if reverse := source.config.data.reverse:
        told(
            f"trained on both directions (data.reverse={reverse:g}): about that share of the sequences runs from the "
            "last residue to the first, and nothing marks them"
        )
    ready()
    with output(args.out, args.context) as out:
        for each in samples:
            facts = f"seed={args.seed} run={source.name} step={source.step} tokens={each.tokens}"
            facts += f" log_likelihood={each.log_likelihood:.4f} ended={'eos' if each.ended else 'length'}"
            if source.vocabulary.name in ALPHABETS:
                _fasta(out, f"sample-{each.number} {facts}", each.text)
            else:
                print(f"=== sample-{each.number} {facts}\n{each.text}", file=out)
    if clock:
        print(speed(clock, length), file=sys.stderr)
    return 0


def _infill(source: Source, args: argparse.Namespace, how: dict[str, Any]) -> int:
    filled = infill(source, args.infill, rounds=args.rounds or 0, **how)
    ready()
    with output(args.out, args.infill) as out:
        for each in filled:
            facts = f"filled={each.hidden} seed={args.seed} run={source.name} step={source.step}"
            _fasta(out, f"{each.id} {facts} log_likelihood={each.log_likelihood:.4f}", each.text)
    return 0


def _around(args: argparse.Namespace) -> tuple[str, str]:
    """What is before the gap, and behind it."""
    if args.prompt:
        raise LongseqError("sample: --prompt, and --infill has what is before the gap: leave --prompt out.")
    if args.infill.count(_GAP) != 1:
        raise LongseqError(
            f"sample: --infill {args.infill[:60]!r} has {args.infill.count(_GAP)} gaps: write one, as in 'MK{_GAP}LV'."
        )
    before, _, behind = args.infill.partition(_GAP)
    return before, behind


def _refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    other = ("prompt", "context", "context_tokens", "length", "number", "timing") if args.infill else ("rounds",)
    for name in other:
        option = name.replace("_", "-")
        if getattr(args, name) not in (None, "", False):
            why = "fills in the records of a file, which it has no effect on" if args.infill else "is missing"
            raise LongseqError(f"sample: --{option}, and --infill {why}: leave --{option} out.")
    if args.timing and args.length == 1:
        raise LongseqError("sample: --timing takes the time between tokens, and --length is 1: take more.")


def _fasta(out: TextIO, header: str, sequence: str) -> None:
    print(f">{header}", file=out)
    for start in range(0, len(sequence), _LINE):
        print(sequence[start : start + _LINE], file=out)


def speed(clock: list[float], length: int) -> str:
    """The line of --timing: the time per token at the beginning and at the end of the first block, without the prompt.

    clock: seconds, after each token of every block of ``length`` tokens.
    """
    part = max(1, min(1000, length // 2))
    steps = [(later - earlier) * 1e3 for earlier, later in pairwise(clock[:length])] or [math.nan]
    first, last = median(steps[:part]), median(steps[-part:])
    from longseq.evaluation.generation import BLOCK

    return (
        f"longseq: {length:,} tokens of {BLOCK} sequences at once: median {first:.3f} ms for the first {part:,}, "
        f"{last:.3f} ms for the last {part:,} ({last / first - 1:+.1%})"
    )
