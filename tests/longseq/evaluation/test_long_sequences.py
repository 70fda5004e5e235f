"""Sequences too long for the logits of all their positions: these exist a piece at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from longseq.evaluation.generation import Settings, draw
from longseq.evaluation.infilling import fill
from longseq.evaluation.likelihood import causal, pseudo
from longseq.evaluation.request import samples_of
from longseq.evaluation.split_scores import score
from longseq.measure.peaks import PeakMeter
from longseq.models import head
from longseq.trained_model import find

LENGTH = 6000


@pytest.fixture
def long_text(trained, folder):
    """find() of a model of bytes, and a file of one text."""
    text = "".join(random.Random(3).choices("abcdefgh \n", k=LENGTH - 1))
    (folder / "long.txt").write_text(text)
    sizes = ("model.dim=8", "model.depth=1", "model.heads=1", "model.ffn_dim=8", "attention.features=8")
    data = ("data.train=long.txt", "data.test=long.txt", f"data.length={LENGTH}", f"data.batch_tokens={LENGTH}")

    def long_text(*overrides):
        return find(trained("long", *data, *sizes, *overrides)), text

    return long_text


def peak(call):
    meter = PeakMeter(torch.device("cpu"))
    try:
        found = call()
    finally:
        highest = meter.stop()
    return found, highest


def test_a_long_sequence_is_scored_without_its_logits(long_text, monkeypatch, one_thread):
    source, text = long_text()
    model, samples = source.load(), samples_of(source, "test")
    tokens = [source.begins, *text.encode()]
    row = np.array([*tokens, source.vocabulary.eos])
    whole = LENGTH * source.vocabulary.size * 4
    calls = (
        lambda: score(model, samples, batch_sequences=1),
        lambda: causal(model, source.vocabulary, [row]),
        lambda: list(draw(model, source.vocabulary, source.begins, tokens[1:], 1, Settings(1))),
    )
    (tally, most), *others = [peak(call) for call in calls]
    assert most > whole  # in one piece: what is measured is there to be seen
    monkeypatch.setattr(head, "MOST_ROWS", 512)
    (in_pieces, less), *others_in_pieces = [peak(call) for call in calls]
    assert less < whole / 2
    np.testing.assert_allclose(in_pieces.loss, tally.loss, rtol=1e-6)
    for name in ("number", "targets", "correct", "near", "wanted", "predicted", "hits", "bin_targets"):
        assert np.array_equal(getattr(in_pieces, name), getattr(tally, name))
    assert all(highest < whole / 2 for _, highest in others_in_pieces)
    assert others_in_pieces[0][0] == pytest.approx(others[0][0], rel=1e-6)
    assert others_in_pieces[1][0][0].tokens == others[1][0][0].tokens


def test_masked_positions_of_a_long_sequence_are_predicted_without_their_logits(long_text, monkeypatch, one_thread):
    source, text = long_text("model.objective=masked")
    monkeypatch.setattr(head, "MOST_ROWS", 512)
    model, vocabulary = source.load(), source.vocabulary
    whole = LENGTH * vocabulary.size * 4
    row = np.array([source.begins, *text.encode(), vocabulary.eos])
    _, highest = peak(lambda: pseudo(model, vocabulary, row, 1))
    assert highest < whole / 2
    hidden = [vocabulary.mask] * (LENGTH - 1)
    filled, highest = peak(lambda: fill(model, vocabulary, source.begins, hidden, 1, Settings(1, temperature=0.0)))
    assert highest < whole
    assert vocabulary.mask not in filled.tokens
