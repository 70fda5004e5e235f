"""Fill in the middle: any packing, laid out and put back; what is scored; draws that nothing but the sample decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from corpora import clustered
from laid_out import documents, original, plainly
from longseq_data.prepare.members import member_index
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.draw import Draw
from longseq_data.samples.infilling import Infilling, Pieces
from longseq_data.samples.mixture import MixtureSpec
from longseq_data.samples.rank_share import Samples, Share
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import BOS, BUILT_IN, BYTES, DNA, EOS, IGNORE, PAD, PROTEIN, RESIDUES, InfillVocabulary

LENGTH = 40
TOKENS = InfillVocabulary.of(PROTEIN)
# Of most steps a rank has no sample of the rare part.
MIXTURES = {
    "mixture": ("crop", "stream crop", [1.0, 1.0]),
    "mixture of files": ("stream concat", "stream concat", [9.0, 1.0]),
    "mixture of both": ("stream concat reset", "concat reset", [9.0, 1.0]),
}
WAYS = [
    *("stream crop", "stream concat", "stream concat reset", *MIXTURES),
    *("crop", "bucket", "concat", "concat reset", "family"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return clustered(tmp_path_factory.mktemp("infilling"), [1, 2, 3, 25, 1, 7], 30, longest=60, seed=4)


@pytest.fixture
def make(place: Path) -> Callable[..., Samples]:
    """make(way, fim_rate=..., ...): the samples of a way."""

    def make(way: str, **changes: object) -> Samples:
        kind, _, reset = way.removeprefix("stream ").partition(" ")
        common = {"length": LENGTH, "objective": "causal", "seed": 3, "reset": bool(reset), **changes}
        if way in MIXTURES:
            first, second, weights = MIXTURES[way]
            parts = make(first, **changes), make(second, **{**changes, "seed": 8})
            return MixtureSpec(("a", "b"), parts, Draw(3, weights), 3, "reset" in first)
        if way.startswith("stream"):
            files = {"sources": (str(place / "a.fasta"),), "split": None, "valid_fraction": 0, "test_fraction": 0}
            return StreamSpec(**files, **common, packing=kind, shuffle_buffer=8)  # type: ignore[arg-type]
        index = None
        if kind == "family":
            index = member_index(str(place / "corpus"), "train", str(place / "table.tsv"), place / "cache")
        corpus = str(place / "corpus")
        how = {"packing": kind, "batch_tokens": 4 * LENGTH, "members": index}
        return CorpusSpec(corpus, "train", **how, **common)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("rate", [0.6, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_a_plain_loop_and_put_back_they_are_the_documents(make, way, rate):
    spec = make(way, fim_rate=rate)
    numbers = np.arange(60)
    plain, segments = spec.taker(0).take(numbers, 60).rows()
    infilling = Infilling.of(rate, False, spec.seed, spec.vocabulary, LENGTH, training=True)
    out, of, middles = infilling.rows(plain, segments, numbers)
    laid = 0
    for number, (before, after) in enumerate(zip(plain, out, strict=True)):
        before, after = before[before >= 0].tolist(), after[after >= 0]
        assert after.tolist() == plainly(before, number, rate, spec.seed, LENGTH + 1, TOKENS)
        marks = int((after >= TOKENS.prefix).sum())
        back = original(after, TOKENS).tolist()
        assert back == before[: len(back)]
        assert len(back) == min(len(before), LENGTH + 1 - marks)
        laid += marks // 3
        if of is not None:
            lengths = [len(each) for each in documents([token for token in after.tolist() if token < TOKENS.prefix])]
            assert len(np.unique(of[number][of[number] >= 0])) == len(lengths)
            assert (np.diff(of[number, : len(after)]) >= 0).all()
            assert ((of[number] >= 0) == (out[number] >= 0)).all()
    assert laid > 30
    assert middles.sum() > laid
    where = np.flatnonzero(middles.ravel() & ~np.isin(out.ravel(), [EOS]))
    assert (out.ravel()[where] < RESIDUES).all()


@pytest.mark.parametrize("way", WAYS)
def test_all_but_marks_is_scored_and_steps_know_how_much_that_is(make, way):
    spec = make(way, fim_rate=0.6)
    marks = 0
    for make_batch in islice(spec.training(0, Share(4, 1, 0, 1)), 12):
        batch = make_batch()
        tokens, targets = batch["tokens"], batch["targets"]
        assert batch["step_targets"] == (targets != IGNORE).sum()
        assert targets.max() < TOKENS.prefix
        assert tokens.shape[1] <= LENGTH
        inside = np.s_[:, 1:], np.s_[:, :-1]
        given = tokens[inside[0]] >= TOKENS.prefix
        marks += int(given.sum())
        assert (targets[inside[1]][given] == IGNORE).all()
        rest = ~given & (tokens[inside[0]] != PAD) & (tokens[inside[0]] != BOS)
        assert (targets[inside[1]][rest] == tokens[inside[0]][rest]).all()
        if "segments" in batch:
            assert ((batch["segments"] >= 0) == (tokens != PAD)).all()
    assert marks > 30


@pytest.mark.parametrize("way", ["stream concat", *MIXTURES, "concat reset", "family"])
def test_samples_are_the_same_for_any_number_of_ranks_and_after_a_resume(make, way):
    spec = make(way, fim_rate=0.6)

    def rows(world: int, start: int, steps: int) -> list[list[int]]:
        batches = [
            each()
            for rank in range(world)
            for each in islice(spec.training(start, Share(8 // world, 1, rank, world)), steps)
        ]
        found = [row[row != PAD].tolist() for batch in batches for row in batch["tokens"]]
        return sorted(row for row in found if row)

    together = rows(1, 0, 4)
    assert rows(2, 0, 4) == together
    consumed = [int(each()["samples"]) for each in islice(spec.training(0, Share(8, 1, 0, 1)), 2)][-1]
    assert sorted(rows(1, 0, 2) + rows(1, consumed, 2)) == together


@pytest.mark.parametrize("way", WAYS)
def test_without_a_document_laid_out_samples_are_those_of_a_causal_run(make, way):
    for changes in ({"fim_rate": 0.0}, {"fim_rate": None}):
        pairs = zip(
            *(islice(s.training(0, Share(4, 1, 0, 1)), 6) for s in (make(way), make(way, **changes))), strict=True
        )
        for one, other in pairs:
            expected, found = one(), other()
            assert all((expected[name] == found[name]).all() for name in expected)


@pytest.mark.parametrize("way", ["stream crop", "stream concat", "crop", "concat reset", "family", *MIXTURES])
def test_an_evaluation_reads_left_to_right_or_scores_the_middle_of_every_document(make, way):
    share = Share(4, 1, 0, 1)
    spec = make(way, fim_rate=0.6)
    for causal, own in zip(make(way).evaluation(share), spec.evaluation(share), strict=True):
        expected, found = causal(), own()
        assert all((expected[name] == found[name]).all() for name in expected)
    middles = 0
    for batch in (each() for each in spec.infilling().evaluation(share)):
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            inside = False
            for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
                inside = token == TOKENS.middle or (inside and token < RESIDUES)
                middles += token == TOKENS.middle
                assert (target != IGNORE) <= inside
                assert target < RESIDUES or target == EOS
    assert middles > 30
    elsewhere = replace(spec, seed=77) if way not in MIXTURES else spec
    same = [each()["tokens"] for each in islice(elsewhere.infilling().evaluation(share), 3)]
    assert all((a == b()["tokens"]).all() for a, b in zip(same, spec.infilling().evaluation(share), strict=False))


def test_marks_are_the_ids_behind_a_vocabulary_that_stays_as_it_was():
    assert [each.size for each in BUILT_IN.values()] == [29, 9, 260, 260]
    for tokens in (PROTEIN, DNA, BYTES):
        more = InfillVocabulary.of(tokens)
        assert (more.prefix, more.suffix, more.middle, more.size) == (
            *range(tokens.size, tokens.size + 3),
            tokens.size + 3,
        )
        assert (more.bos, more.eos, more.pad, more.mask, more.ordinary) == (
            *(tokens.bos, tokens.eos, tokens.pad, tokens.mask, tokens.ordinary),
        )


def test_cuts_are_uniform_and_as_many_documents_are_laid_out_as_the_rate_says():
    infilling = Infilling(0.3, 5, TOKENS, 64)
    n = 20_000
    ones = np.ones(n, dtype=np.int64)
    laid = infilling.laid(Pieces(ones, ones, 4 * ones, ones), np.arange(n))
    assert abs(laid.chosen.mean() - 0.3) < 0.015
    pairs = np.zeros((5, 5))
    np.add.at(pairs, tuple(laid.cuts[laid.chosen].T), 1)
    expected = np.triu(np.full((5, 5), 2.0), 1) + np.eye(5)  # two places of five, drawn alike
    assert np.abs(pairs / pairs.sum() - expected / 25).max() < 0.01
    assert (pairs[np.tril_indices(5, -1)] == 0).all()


def test_a_rate_that_is_none_is_refused(make):
    with pytest.raises(ValueError, match=r"fim_rate must be a probability of causal samples, not 1\.5 of causal ones"):
        make("crop", fim_rate=1.5)
    with pytest.raises(ValueError, match=r"not 0\.5 of masked ones"):
        make("stream crop", fim_rate=0.5, objective="masked")
