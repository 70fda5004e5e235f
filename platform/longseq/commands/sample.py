"""Write new sequences with a causal model, or fill in masked positions with a masked one.

Each token costs the same however many went before: the model carries a state of fixed size. A sequence is a function
of the model, the options, the seed and its number, so --number 100 begins with the sequences of --number 10.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TextIO

from longseq.commands.numbers import natural, positive, real, share
from longseq.commands.options import add_model, add_overrides, output, ready
from longseq.errors import LongseqError
from longseq.opening import Source, find
from longseq_data.readers.fasta import read_records
from longseq_data.vocabulary import ALPHABETS, UNKNOWN, Alphabet

if TYPE_CHECKING:
    from longseq.evaluation.sampling import Drawn, Settings

_LINE = 60  # residues a line of FASTA
_HIDDEN = "?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_overrides(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what every sequence begins with")
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
    parser.add_argument("--infill", metavar="FASTA", help="with a masked model: fill in the positions written as '?'")
    parser.add_argument(
        "--rounds",
        type=natural,
        metavar="N",
        help="passes of --infill, the surest positions first; 1: all at once; default 0: a pass a position",
    )
    parser.add_argument(
        "--timing", action="store_true", help="draw --length tokens whatever they are, and say how long each took"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="FASTA or text; default: standard output")


def run(args: argparse.Namespace) -> int:
    _refuse_what_has_no_effect(args)
    source = find(args.target, args.overrides, ema=args.ema)
    if source.vocabulary.name == "pixels":
        raise LongseqError(f"{source.folder}: a model of pixels; sample writes proteins and text.")
    if args.infill:
        return _infill(source, args)
    source.require("causal", "sample continues with causal models; fill in masked positions with --infill FASTA.")
    from longseq.evaluation.records import prompt_tokens

    prompt = prompt_tokens(args.prompt, source.vocabulary, "--prompt")

    from longseq.evaluation.sampling import draw

    ready()
    model = source.load()
    clock: list[float] | None = [] if args.timing else None
    settings = _settings(args, temperature=1.0)
    with output(args.out) as out:
        drawn = draw(model, source.vocabulary, source.begins, prompt, args.number or 1, settings, clock)
        for each in drawn:
            _write(out, source, each, args)
    if clock:
        print(speed(clock, settings.length), file=sys.stderr)
    return 0


def _refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    other = ("prompt", "length", "number", "timing") if args.infill else ("rounds",)
    for name in other:
        if getattr(args, name) not in (None, "", False):
            why = "fills in the records of a file, which it has no effect on" if args.infill else "is missing"
            raise LongseqError(f"sample: --{name}, and --infill {why}: leave --{name} out.")
    if args.timing and args.length == 1:
        raise LongseqError("sample: --timing takes the time between tokens, and --length is 1: take more.")


def _settings(args: argparse.Namespace, temperature: float) -> Settings:
    from longseq.evaluation.sampling import Settings

    return Settings(
        length=args.length or 512,
        temperature=temperature if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=not args.timing,
    )


def _write(out: TextIO, source: Source, drawn: Drawn, args: argparse.Namespace) -> None:
    from longseq.evaluation.tokens import plain_text

    facts = f"seed={args.seed} run={source.name} step={source.step} tokens={len(drawn.tokens)}"
    facts += f" log_likelihood={drawn.log_likelihood:.4f} ended={'eos' if drawn.ended else 'length'}"
    text = plain_text(drawn.tokens, source.vocabulary)
    if source.vocabulary.name in ALPHABETS:
        _fasta(out, f"sample-{drawn.number} {facts}", text)
    else:
        print(f"=== sample-{drawn.number} {facts}\n{text}", file=out)


def _fasta(out: TextIO, header: str, sequence: str) -> None:
    print(f">{header}", file=out)
    for start in range(0, len(sequence), _LINE):
        print(sequence[start : start + _LINE], file=out)


def speed(clock: list[float], length: int) -> str:
    """The line of --timing: the time a token at the beginning and at the end of the first block, without the prompt.

    clock: seconds, after each token of every block of ``length`` tokens.
    """
    part = max(1, min(1000, length // 2))
    steps = [(later - earlier) * 1e3 for earlier, later in pairwise(clock[:length])] or [math.nan]
    first, last = median(steps[:part]), median(steps[-part:])
    from longseq.evaluation.sampling import BLOCK

    return (
        f"longseq: {length:,} tokens of {BLOCK} sequences at once: median {first:.3f} ms for the first {part:,}, "
        f"{last:.3f} ms for the last {part:,} ({last / first - 1:+.1%})"
    )


def _infill(source: Source, args: argparse.Namespace) -> int:
    source.require("masked", "--infill needs a masked one; a causal one continues a --prompt.")
    alphabet = ALPHABETS.get(source.vocabulary.name)
    if alphabet is None:
        raise LongseqError(f"{source.folder}: a model of text; --infill works on proteins and DNA.")
    records = list(_masked_records(args.infill, alphabet))

    from longseq.evaluation.infilling import fill
    from longseq.evaluation.tokens import plain_text

    ready()
    model = source.load()
    with output(args.out) as out:
        settings = _settings(args, temperature=0.0)
        for number, (identifier, tokens) in enumerate(records):
            filled = fill(model, source.vocabulary, source.begins, tokens, args.rounds or 0, settings, number)
            hidden = tokens.count(source.vocabulary.mask)
            facts = f"filled={hidden} seed={args.seed} run={source.name} step={source.step}"
            header = f"{identifier} {facts} log_likelihood={filled.log_likelihood:.4f}"
            _fasta(out, header, plain_text(filled.tokens, source.vocabulary))
    return 0


def _masked_records(file: str, alphabet: Alphabet) -> Iterator[tuple[str, list[int]]]:
    """Identifier and ids of each record, '?' as MASK.

    Raises:
        DataError, LongseqError: for what is no FASTA, a letter that is no residue, and a file without any '?'.
    """
    hidden = 0
    for record in read_records(file):
        mask, table = alphabet.vocabulary.mask, alphabet.table
        tokens = [mask if letter == _HIDDEN else table[ord(letter)] for letter in record.sequence]
        if UNKNOWN in tokens:
            at = tokens.index(UNKNOWN)
            line = record.place_of(at)[1]
            raise LongseqError(
                f"{file}, line {line}: {record.sequence[at]!r} in record '{record.identifier}' is neither one of "
                f"{alphabet.letters} nor '{_HIDDEN}'; correct it."
            )
        hidden += tokens.count(mask)
        yield record.identifier, tokens
    if not hidden:
        raise LongseqError(f"{file}: no '{_HIDDEN}' in any record: write one for each residue to be filled in.")
