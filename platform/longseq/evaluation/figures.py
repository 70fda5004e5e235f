"""What the pictures of a run show, from its curves, its evaluations and its weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longseq.errors import ConfigError
from longseq.evaluation import drawing
from longseq.runs.curves import read_curves
from longseq.trained_model import Source
from longseq_data.errors import DataError
from longseq_data.vocabulary import LETTERS, STANDARD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from longseq.models.performer import PerformerLM

Matrix = npt.NDArray[np.floating]

SCORED = 512  # sequences of a split, where no evaluation is kept
_DRAWS = 4
_DRAWN = {"from", "to", "targets", "accuracy", "perplexity"}  # of each bucket of lengths
# Kernels whose expectation is the softmax's.
_ESTIMATES = ("softmax", "hyperbolic", "oprf", "sderf", "aderf", "trigonometric", "smreg")


def figures(source: Source) -> Iterator[tuple[str, Figure]]:
    """Name and picture, one after the other."""
    from longseq.measure.attention_probe import errors, probe
    from longseq.training.callbacks.probe_batch import probe_batch

    assert source.run is not None
    title = f"{source.name}, step {source.step:,}"
    folder = source.run.tensorboard_dir
    curves = read_curves(folder) if folder.is_dir() else {}
    evaluated = read_curves(folder / "evaluation") if (folder / "evaluation").is_dir() else {}
    if curves:
        yield "curves", drawing.training_curves(curves, evaluated, source.name)

    if source.tuned:  # the others are of tokens
        return
    model = source.load()
    by_length = _by_length(source, model)
    if by_length:
        yield "accuracy_by_length", drawing.accuracy_by_length(by_length, title)

    if source.vocabulary.name == "protein":
        cosine, blosum = embedding_cosines(model), blosum62()
        correlation = pair_correlation(cosine, blosum)
        yield "embedding_similarity", drawing.similarities(cosine, blosum, LETTERS[:STANDARD], correlation, title)

    plan = source.spec.plan
    batch = probe_batch(source.config, next(model.parameters()).device)
    for number, (layer, of) in enumerate(zip(probe(model, batch), plan, strict=True)):
        own = None if of.kind == "exact" else layer.own.numpy()
        what = f"{title}, layer {number}: what one held-out sequence looks at"
        yield f"attention_layer{number:02}", drawing.attention_maps(own, layer.exact.numpy(), of.kernel, what)

    far = {number: of for number, of in enumerate(plan) if of.has_features}
    if far:
        kernels, features = {of.kernel for of in far.values()}, next(iter(far.values())).features
        numbers = sorted({max(2, features // 4), features, features * 4})
        found = errors(model, batch, numbers, _DRAWS)
        by_number = {m: [layer[at] for layer in found] for at, m in enumerate(numbers)}
        what = f"{title}: attention ({', '.join(sorted(kernels))}) next to softmax attention, {_DRAWS} draws"
        estimates = kernels <= set(_ESTIMATES) and not any(of.learned_share for of in far.values())
        trained = features if {of.features for of in far.values()} == {features} else 0
        yield "approximation_error", drawing.approximation_errors(by_number, list(far), trained, estimates, what)


def embedding_cosines(model: PerformerLM) -> Matrix:
    """Cosine similarities of the standard amino acids' embeddings less their mean, (20, 20).

    Less their mean, which says what they have in common: that they are residues.
    """
    vectors = model.embedding.weight[:STANDARD].detach().double().cpu().numpy()
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def blosum62() -> Matrix:
    """BLOSUM62 (Henikoff and Henikoff 1992) of the standard amino acids in the order of their ids, (20, 20)."""
    from Bio.Align import substitution_matrices

    matrix = substitution_matrices.load("BLOSUM62")
    return np.array([[matrix[a, b] for b in LETTERS[:STANDARD]] for a in LETTERS[:STANDARD]], dtype=np.float64)


def pair_correlation(a: Matrix, b: Matrix) -> float:
    """Pearson's correlation over the pairs of different letters."""
    pairs = np.triu_indices(len(a), 1)
    return float(np.corrcoef(a[pairs], b[pairs])[0, 1])


def _by_length(source: Source, model: PerformerLM) -> dict[str, list[dict[str, Any]]]:
    """Of the kept evaluation of this checkpoint, or of a sample of each split that is scored now; empty: of neither."""
    kept = _kept(source)
    if kept:
        return kept
    from longseq.data import corpus_of
    from longseq.evaluation.request import batch_sequences, samples_of
    from longseq.evaluation.split_scores import score
    from longseq.evaluation.summary import by_length

    splits = ["test", *(["ood"] if source.config.data.ood or corpus_of(source.config, "ood") else [])]
    rows, at_once = {}, batch_sequences(source.config)
    for split in splits:
        try:
            tally = score(model, samples_of(source, split), batch_sequences=at_once, max_samples=SCORED)
        except (ConfigError, DataError) as error:  # a run need not hold anything out
            print(f"longseq: warning: accuracy by length is drawn without {split}: {error}", file=sys.stderr)
            continue
        rows[f"{split} ({len(tally.number):,} sequences)"] = list(by_length(tally))
    return rows


def _kept(source: Source) -> dict[str, list[dict[str, Any]]]:
    assert source.run is not None
    for path in sorted(source.run.evaluations_dir.glob(f"{source.folder.stem}-*.json")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged, or somebody's own file
            report = json.loads(path.read_text())
            own = report["weights"] == "last" and not report["overrides"] and not report["sequences_limit"]
            splits = {name: report["splits"][name]["by_length"] for name in ("test", "ood") if name in report["splits"]}
            known = all(row.keys() >= _DRAWN for rows in splits.values() for row in rows)
            if own and splits and known:
                return splits
    return {}
