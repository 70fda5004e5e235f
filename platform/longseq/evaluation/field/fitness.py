"""A model's scores of an assay's mutants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longseq.evaluation.field.assays import SUBSTITUTIONS, Entry, Scan
from longseq.evaluation.field.baselines import baselines
from longseq.evaluation.field.measures import Floats, Result, above_median, measures, measures_by_depth
from longseq.evaluation.likelihood import causal, effects, pseudo
from longseq.evaluation.records import Record, batches, record_of
from longseq.evaluation.variants import Variant
from longseq.models.performer import PerformerLM
from longseq.trained_model import Source


def fitness(
    source: Source, model: PerformerLM, entry: Entry, scan: Scan, passes: int, both: bool = False
) -> tuple[Floats, Result]:
    """Score every mutant, larger being likelier than the wild type, and measure how well that predicts DMS_score.

    Substitutions: masked marginals, or the difference of log-likelihoods of a causal model. Indels: the difference of
    (pseudo-)log-likelihoods of whole sequences. Proteins are read whole, however long. both: of a causal model the mean
    over both directions.

    Raises:
        LongseqError: for a mutant that does not fit the target; naming file and line.
    """
    wild = record_of(source, entry.assay.id, entry.target, f"{entry.assay.id}, target_seq")
    if scan.kind == SUBSTITUTIONS:
        variants = scan.variants(wild)
        found = effects(model, source.vocabulary, wild, variants, source.causal, both)
        scores = np.array([effect for _, effect in found])
    else:
        variants = []
        scores = _of_sequences(source, model, wild, scan, passes, both)
    return scores, _result(scan, variants, scores)


def _of_sequences(source: Source, model: PerformerLM, wild: Record, scan: Scan, passes: int, both: bool) -> Floats:
    found: list[float] = []
    for group in batches([wild, *scan.sequences(source)], lambda record: len(record.row)):
        rows = [record.row for record in group]
        if source.causal:
            found += causal(model, source.vocabulary, rows, both=both)
        else:
            found += [pseudo(model, source.vocabulary, row, passes) for row in rows]
    return np.array(found[1:]) - found[0]


def _result(scan: Scan, variants: Sequence[Variant], scores: Floats) -> Result:
    def of(values: Floats) -> dict[str, float]:
        return measures(scan.measured, values, scan.fit, above_median(values))

    if not variants:
        return Result(of(scores), {}, {})
    changes = [len(variant.changes) for variant in variants]
    by_depth = measures_by_depth(scan.measured, scores, scan.fit, changes)
    return Result(of(scores), by_depth, {name: of(score(variants)) for name, score in baselines().items()})
