"""New sequences, and masked positions filled in: what ``longseq sample`` does, as functions that return data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.errors import LongseqError
from longseq.evaluation.context import Asked, contexts, path_of
from longseq.evaluation.records import prompt_tokens
from longseq.trained_model import Source, find
from longseq_data.readers.fasta import read_records
from longseq_data.samples.infilling import laid_out
from longseq_data.vocabulary import ALPHABETS, UNKNOWN, Alphabet, InfillVocabulary, Tokens

if TYPE_CHECKING:
    from longseq.evaluation.generation import Settings

_HIDDEN = "?"


@dataclass(frozen=True)
class Sample:
    """One sequence that was drawn."""

    number: int
    text: str
    tokens: int  # of the prompt and those drawn, without the end
    log_likelihood: float  # of these, and of the end if it was drawn, in nats, under the model itself
    ended: bool  # by the end of a sequence, not by the length


@dataclass(frozen=True)
class Filled:
    """One record whose hidden positions were filled in."""

    id: str
    text: str
    hidden: int  # positions that were filled
    log_likelihood: float  # of the filled positions, in nats, each as it was when it was chosen


def sample(
    target: str | Path | Source,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    prompt: str = "",
    number: int = 1,
    length: int = 512,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    clock: list[float] | None = None,
    context: str | Path | None = None,
    context_tokens: int = 0,
    suffix: str | None = None,
) -> Iterator[Sample]:
    """Sequences drawn from a causal model. Each is a function of the model, these arguments and its number.

    One that was trained on both directions (data.reverse) writes some from the last residue to the first, unmarked.

    Args:
        target: a run folder, a checkpoint, an exported folder, or what ``longseq.find`` returned for one of these.
        overrides: ``section.key=value`` on top of the run's configuration.
        ema: with the running mean of the weights.
        prompt: what every sequence begins with.
        length: tokens to draw at most.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0: all.
        top_p: of these, the fewest that together have this probability; 1: all.
        clock: gets the time after each token; then ``length`` tokens are drawn, whatever they are.
        context: FASTA or an alignment (A3M) of relatives, which come before: sequences of their family are drawn.
        context_tokens: as many of them, in an order of ``seed``, as fit into these; 0: into three
            quarters of data.length.
        suffix: what every sequence ends with, of a model that fills in (model.objective fim): what is between
            ``prompt`` and this is drawn, and ``log_likelihood`` is that of what was drawn.

    Raises:
        LongseqError: at once, for a model that is not causal, a prompt of other letters, and a number out of bounds.
    """
    _refuse_numbers(length=length, number=number, temperature=temperature, top_k=top_k, top_p=top_p)
    source = _source(target, overrides, ema)
    source.require("causal", "sample continues with causal models, and infill fills in positions with masked ones.")
    begin = prompt_tokens(prompt, source.vocabulary, "prompt")
    end = None if suffix is None else prompt_tokens(suffix, source.vocabulary, "suffix")
    if end is not None and not isinstance(source.vocabulary, InfillVocabulary):
        raise LongseqError(
            f"{source.folder}: was not trained to fill in (model.objective={source.config.model.objective}); give a "
            "model of model.objective=fim, or leave the suffix out."
        )
    asked = Asked(path_of(context), context_tokens)
    asked.check(source)
    before = next(iter(contexts(source, asked, seed, say=True)), None)

    from longseq.evaluation.generation import Settings

    settings = Settings(length, temperature, top_k, top_p, seed, stop=clock is None)
    return _drawn(source, begin, end, number, settings, clock, before)


def infill(
    target: str | Path | Source,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    rounds: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Filled]:
    """The records of a FASTA file with each '?' filled in by a masked model.

    Args:
        rounds: passes, the surest positions first; 1: all at once; 0: one pass per position.

    The other arguments are those of :func:`sample`.

    Raises:
        LongseqError, DataError: at once, for a model that is not masked, a file that is no FASTA, a letter that is no
            residue, and a file without any '?'.
    """
    _refuse_numbers(rounds=rounds, temperature=temperature, top_k=top_k, top_p=top_p)
    source = _source(target, overrides, ema)
    source.require("masked", "infill needs a masked one, and sample continues with causal ones.")
    alphabet = ALPHABETS.get(source.vocabulary.name)
    if alphabet is None:
        raise LongseqError(f"{source.folder}: a model of text; infill works on proteins and DNA.")
    records = list(_masked_records(str(file), alphabet))

    from longseq.evaluation.generation import Settings

    return _filled(source, records, rounds, Settings(512, temperature, top_k, top_p, seed))


def _refuse_numbers(**given: float) -> None:
    least = {"length": 1, "number": 1}
    for name, value in given.items():
        if not least.get(name, 0) <= value < math.inf:
            raise LongseqError(f"{name}={value}: take {least.get(name, 0)} or more.")
        if name == "top_p" and not 0 < value <= 1:
            raise LongseqError(f"top_p={value}: take a share above 0 and at most 1.")


def _source(target: str | Path | Source, overrides: Sequence[str], ema: bool) -> Source:
    source = find(target, overrides, ema=ema)
    if source.vocabulary.name == "pixels":
        raise LongseqError(f"{source.folder}: a model of pixels; sample writes proteins and text.")
    return source


def _drawn(
    source: Source,
    prompt: list[int],
    suffix: list[int] | None,
    number: int,
    settings: Settings,
    clock: list[float] | None,
    context: Tokens | None,
) -> Iterator[Sample]:
    from longseq.evaluation.generation import draw
    from longseq.evaluation.tokens import plain_text

    vocabulary, given = source.vocabulary, prompt
    if suffix is not None:
        assert isinstance(vocabulary, InfillVocabulary)
        before = [source.begins] if context is None else context.tolist()
        context = laid_out(before, prompt, suffix, vocabulary)
        given = []  # it is in the context
    for each in draw(source.load(), vocabulary, source.begins, given, number, settings, clock, context):
        tokens = each.tokens if suffix is None else (*prompt, *each.tokens, *suffix)
        text = plain_text(tokens, vocabulary)
        yield Sample(each.number, text, len(tokens), each.log_likelihood, each.ended)


def _filled(
    source: Source, records: Sequence[tuple[str, list[int]]], rounds: int, settings: Settings
) -> Iterator[Filled]:
    from longseq.evaluation.infilling import fill
    from longseq.evaluation.tokens import plain_text

    model = source.load()
    for number, (identifier, tokens) in enumerate(records):
        filled = fill(model, source.vocabulary, source.begins, tokens, rounds, settings, number)
        text = plain_text(filled.tokens, source.vocabulary)
        yield Filled(identifier, text, tokens.count(source.vocabulary.mask), filled.log_likelihood)


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
