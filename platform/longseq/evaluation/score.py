"""Log-likelihoods of sequences and effects of mutations: what ``longseq score`` does, as functions that return data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from longseq.errors import LongseqError
from longseq.evaluation.context import Asked, contexts, path_of, say_known
from longseq.evaluation.records import Record, both_directions, look, records
from longseq.evaluation.shards import Job, done, refuse_devices
from longseq.trained_model import Source, find

if TYPE_CHECKING:
    from longseq.evaluation.variants import Variant
    from longseq_data.vocabulary import Tokens


@dataclass(frozen=True)
class SequenceScore:
    """One record's log-likelihood, in nats: of residues and end; pseudo: of a masked model, of residues alone."""

    id: str
    length: int
    log_likelihood: float
    pseudo: bool

    @property
    def mean(self) -> float:
        """Per predicted token; NaN where there is none."""
        targets = self.length + (not self.pseudo)  # with the end
        return self.log_likelihood / targets if targets else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(-self.mean, 700.0))

    def as_dict(self) -> dict[str, object]:
        return {
            "id": self.id,
            "length": self.length,
            "pseudo_log_likelihood" if self.pseudo else "log_likelihood": self.log_likelihood,
            "mean": self.mean,
            "perplexity": self.perplexity,
        }


@dataclass(frozen=True)
class VariantEffect:
    """A variant's log-likelihood less the wild type's, in nats."""

    id: str  # of the wild type
    variant: str
    changes: int
    effect: float
    measured: float | None = None  # DMS_score of a deep mutational scan

    def as_dict(self) -> dict[str, object]:
        return {"id": self.id, "variant": self.variant, "changes": self.changes, "effect": self.effect}


def score(
    target: str | Path | Source,
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    passes: int = 0,
    devices: int = 1,
    direction: str | None = None,
    context: str | Path | None = None,
    context_tokens: int = 0,
    context_orders: int = 1,
) -> Iterator[SequenceScore]:
    """The log-likelihood of each record, in the file's order.

    Args:
        target: a run folder, a checkpoint, an exported folder, or what ``longseq.find`` returned for one of these.
        file: FASTA or text, as the model was trained on.
        overrides: ``section.key=value`` on top of the run's configuration.
        ema: with the running mean of the weights.
        passes: of a masked model: hide every passes-th position at once; 0: one pass per position, exact.
        devices: processes that share the work; results are the same to the last bit.
        direction: forward or both, the mean of a causal model's log-likelihoods of a protein and of its residues from
            the last to the first; None: both where it was trained so (data.reverse), but forward behind a context.
        context: FASTA or an alignment (A3M) of relatives, which a causal model reads before each record.
        context_tokens: as many of them as fit into these; 0: into three quarters of data.length.
        context_orders: how many times they are drawn and ordered anew; the score is the mean over these.

    Raises:
        LongseqError, DataError: at once, for a model or file that cannot be used; while it is read, for a bad record.
    """
    source = find(target, overrides, ema=ema)
    if passes < 0:
        raise LongseqError(f"passes={passes}: take 0 or more.")
    if passes and source.causal:
        raise LongseqError(f"passes={passes}: a causal model takes one pass per sequence in any case: leave it out.")
    refuse_devices(devices)
    behind = Asked(path_of(context), context_tokens, context_orders)
    behind.check(source)
    look(source, str(file))
    both = both_directions(source, direction, context)
    options = {"passes": passes, "context": list(behind), **({"both": True} if both else {})}
    job = Job("score", str(source.folder), str(file), tuple(overrides), ema, options)
    before = contexts(source, behind, say=True)
    if behind.file is not None:
        say_known(source, str(file), behind.file)
    return _scores(source, job, devices, before)


def variant_effects(
    target: str | Path | Source,
    file: str | Path,
    variants: Sequence[str] = (),
    table: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    ema: bool = False,
    devices: int = 1,
    direction: str | None = None,
    context: str | Path | None = None,
    context_tokens: int = 0,
    context_orders: int = 1,
) -> Iterator[VariantEffect]:
    """The effect of each variant of one wild type, in the order given.

    Args:
        file: FASTA of the wild type alone.
        variants: as ``A24G``, or several changes ``A24G:C30D``.
        table: a file with one variant per line, after those; or a deep mutational scan as ProteinGym has them, a CSV
            with the columns mutant and DMS_score.

    The other arguments and the errors are those of :func:`score`.
    """
    source = find(target, overrides, ema=ema)
    refuse_devices(devices)
    behind = Asked(path_of(context), context_tokens, context_orders)
    behind.check(source)
    look(source, str(file))
    both = both_directions(source, direction, context)
    named = {"variants": list(variants), "table": path_of(table), "context": list(behind)}
    options = {**named, **({"both": True} if both else {})}
    asked = asked_for(source, str(file), variants, table)
    job = Job("effects", str(source.folder), str(file), tuple(overrides), ema, options)
    return _effects(source, job, asked, devices, contexts(source, behind, say=True))


class Variants(NamedTuple):
    """Variants of a wild type, each with its DMS_score if it came with one."""

    wild: Record
    variants: list[Variant]
    measured: list[float | None]


def asked_for(source: Source, file: str, variants: Sequence[str], table: str | Path | None) -> Variants:
    """What :func:`variant_effects` was asked for. Raises LongseqError for what does not fit together."""
    from longseq.evaluation.field.assays import SUBSTITUTIONS, is_scan, scan
    from longseq.evaluation.variants import read_variants

    if source.vocabulary.name != "protein":
        raise LongseqError(f"{source.folder}: a model of text; variants are those of proteins.")
    found = list(islice(records(source, file), 2))
    if len(found) != 1:
        raise LongseqError(
            f"{file}: more than one record, and variants are held against one wild type: give a FASTA of it alone."
        )
    (wild,) = found
    if table is None or not is_scan(Path(table)):
        given = read_variants(variants, Path(table) if table else None, wild)
        return Variants(wild, given, [None] * len(given))
    assay = scan(Path(table))
    if assay.kind != SUBSTITUTIONS:
        raise LongseqError(
            f"{table}: its mutants are whole sequences, and variants are changes, as A24G; `longseq benchmark "
            "proteingym` takes such a file."
        )
    given = read_variants(variants, None, wild)
    return Variants(wild, [*given, *assay.variants(wild)], [*[None] * len(given), *assay.measured.tolist()])


def _scores(source: Source, job: Job, devices: int, before: list[Tokens]) -> Iterator[SequenceScore]:
    from longseq.evaluation.work import Scores

    work = Scores(job, source)
    work.before = before
    yield from (SequenceScore(**row) for row in done(work, devices))


def _effects(source: Source, job: Job, asked: Variants, devices: int, before: list[Tokens]) -> Iterator[VariantEffect]:
    """Those of a causal model as they come; a masked one has variants of the same sites in one pass."""
    from longseq.evaluation.work import Effects

    work = Effects(job, source)
    work.asked, work.before = asked, before
    found: dict[int, float] = {}
    following = 0
    for number, effect in done(work, devices):
        found[number] = effect
        while following in found:
            variant = asked.variants[following]
            yield VariantEffect(
                asked.wild.identifier,
                variant.name,
                len(variant.changes),
                found.pop(following),
                asked.measured[following],
            )
            following += 1
