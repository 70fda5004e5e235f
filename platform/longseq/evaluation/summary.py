"""From counts to numbers that people compare: means, intervals, calibration, by length and by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from longseq.evaluation.metrics import Quality, bits_per_unit, word_perplexity
from longseq.evaluation.tally import BINS, DEPTHS, Floats, Tally
from longseq_data.randomness import generator

Summary = dict[str, object]

LEVEL = 0.95  # of the confidence intervals
_AT_ONCE = 1 << 22  # draws of a bootstrap that are held at a time
_TOKENS = 300  # of a larger vocabulary, the most frequent ones are reported by themselves


def summary(tally: Tally, tokens: Sequence[str], kind: str, *, top_k: int, bootstrap: int, seed: int) -> Summary:
    """Everything that an evaluation reports of one split.

    Args:
        tokens: what to call each token; those that never were a target are left out.
        kind: the name of the vocabulary: "protein", "bytes", "pixels" or a tokenizer's file.
        bootstrap: resamplings of the confidence intervals; 0: none.
        seed: what they are drawn from.
    """
    targets = int(tally.targets.sum())
    quality = Quality(float(tally.loss.sum()) / targets, int(tally.correct.sum()) / targets)
    near = f"top_{top_k}_accuracy"
    report: Summary = {
        "sequences": len(tally.number),
        "targets": targets,
        **quality.as_dict(),
        "bits": quality.loss / math.log(2),
        near: int(tally.near.sum()) / targets,
        **_per_unit(tally, quality.loss, targets, kind),
        "ece": calibration_error(tally),
        "reliability": reliability(tally),
        "by_length": by_length(tally),
        **({"by_members_before": by_members_before(tally)} if tally.depth_targets.size else {}),
        "by_token": by_token(tally, tokens),
    }
    if bootstrap:
        report["intervals"] = intervals(tally, near, bootstrap, seed)
    return report


def intervals(tally: Tally, near: str, resamplings: int, seed: int) -> Summary:
    """95 % confidence intervals by the bootstrap over sequences (Efron 1979; percentiles).

    Targets of one sequence are not independent of each other, whole sequences nearly are: each resampling draws as
    many sequences as there are, with replacement, and pools their targets as the evaluation does.
    """
    sums = np.stack([tally.targets, tally.loss, tally.correct, tally.near]).astype(np.float64)  # (4, n)
    n = sums.shape[1]
    drawn: list[Floats] = []
    chunk = max(1, _AT_ONCE // n)
    for first in range(0, resamplings, chunk):
        count = min(chunk, resamplings - first)
        chosen = (generator(seed, "bootstrap", first).random((count, n)) * n).astype(np.int64)
        drawn.append(np.stack([sums[:, row].sum(1) for row in chosen]))
    targets, loss, correct, nearby = np.concatenate(drawn).T
    targets = np.maximum(targets, 1)
    tails = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]

    def interval(values: Floats) -> list[float]:
        return [float(value) for value in np.percentile(values, tails)]

    low, high = interval(loss / targets)
    return {
        "level": LEVEL,
        "resamplings": resamplings,
        "seed": seed,
        "loss": [low, high],
        "perplexity": [math.exp(min(low, 700.0)), math.exp(min(high, 700.0))],
        "accuracy": interval(correct / targets),
        near: interval(nearby / targets),
    }


def reliability(tally: Tally) -> list[Summary]:
    """Of each bin of confidence with targets: their number, mean confidence and accuracy."""
    confidence = tally.confidence.sum(0)
    return [
        {
            "from": bin_ / BINS,
            "to": (bin_ + 1) / BINS,
            "targets": int(count),
            "confidence": float(confidence[bin_] / count),
            "accuracy": int(tally.bin_correct[bin_]) / int(count),
        }
        for bin_, count in enumerate(tally.bin_targets)
        if count
    ]


def calibration_error(tally: Tally) -> float:
    """Expected calibration error: mean |accuracy − confidence| of the bins, by their targets."""
    gaps = np.abs(tally.bin_correct - tally.confidence.sum(0))
    return float(gaps.sum() / tally.bin_targets.sum())


def by_length(tally: Tally) -> list[Summary]:
    """Quality of the sequences of up to 32, 64, 128, ... tokens, those of each bucket together."""
    bucket = np.maximum(np.ceil(np.log2(np.maximum(tally.tokens, 1))).astype(np.int64), 5)
    rows: list[Summary] = []
    for exponent in np.unique(bucket).tolist():
        here = bucket == exponent
        targets = int(tally.targets[here].sum())
        if not targets:
            continue
        quality = Quality(float(tally.loss[here].sum()) / targets, int(tally.correct[here].sum()) / targets)
        longest = {"from": 2 ** (exponent - 1) + 1 if exponent > 5 else 1, "to": 2**exponent}
        rows.append({**longest, "sequences": int(here.sum()), "targets": targets, **quality.as_dict()})
    return rows


def by_members_before(tally: Tally) -> list[Summary]:
    """Of families: the quality of members that come first in their row, after 1, 2 to 3, 4 to 7, ... others."""
    loss, targets = tally.depth_loss.sum(0), tally.depth_targets.sum(0)
    return [
        {
            "from": 2**depth // 2,
            "to": 2**depth - 1 if depth < DEPTHS - 1 else None,
            "targets": int(targets[depth]),
            "loss": float(loss[depth] / targets[depth]),
        }
        for depth in np.flatnonzero(targets).tolist()
    ]


def by_token(tally: Tally, tokens: Sequence[str]) -> dict[str, Summary]:
    """Of each token that was a target or a prediction: both counts, recall and precision."""
    seen = tally.wanted + tally.predicted
    shown = np.sort(np.argsort(-seen, kind="stable")[:_TOKENS])
    return {
        tokens[token]: {
            "targets": int(tally.wanted[token]),
            "predicted": int(tally.predicted[token]),
            "recall": _share(tally.hits[token], tally.wanted[token]),
            "precision": _share(tally.hits[token], tally.predicted[token]),
        }
        for token in shown[seen[shown] > 0].tolist()
    }


def _share(part: np.int64, whole: np.int64) -> float | None:
    return int(part) / int(whole) if whole else None


def _per_unit(tally: Tally, loss: float, targets: int, kind: str) -> dict[str, float]:
    """The loss in units that do not depend on the tokens: bits per byte, perplexity a word, bits per dimension."""
    units, words, measured = tally.extent.tolist()
    if not measured or not units:
        return {}
    bits = bits_per_unit(loss, targets, units)
    if kind == "pixels":
        return {"dimensions": units, "bits_per_dimension": bits}
    found = {"bytes": units, "words": words, "bits_per_byte": bits}
    if words:  # a few sequences of a text may be white space
        found |= {"tokens_per_word": targets / words, "word_perplexity": word_perplexity(loss, targets, words)}
    return found
