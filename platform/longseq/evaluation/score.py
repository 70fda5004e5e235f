"""Log-likelihoods of sequences and effects of mutations: what ``longseq score`` does, as functions that return data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longseq.errors import LongseqError
from longseq.evaluation.context import Asked, contexts, path_of, say_known
from longseq.evaluation.records import both_directions, look
from longseq.evaluation.shards import Job, done, refuse_devices
from longseq.evaluation.variant_request import Variants, asked_for
from longseq.trained_model import Source, find

if TYPE_CHECKING:
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
