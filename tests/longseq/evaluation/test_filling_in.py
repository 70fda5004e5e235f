"""Models that fill in: what evaluate, score and sample make of them, against plain loops; and one that learns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from laid_out import plainly
from longseq.config.loading import load_config
from longseq.data import identities, resolve_sources
from longseq.errors import LongseqError
from longseq.evaluation.evaluate import evaluate
from longseq.evaluation.request import Settings, samples_of
from longseq.evaluation.sample import sample
from longseq.evaluation.score import score
from longseq.evaluation.tokens import token_names
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq.trained_model import find
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import fit
from longseq_data.samples.streaming import evaluation_windows
from longseq_data.vocabulary import BOS, EOS, LETTERS, PROTEIN, InfillVocabulary

from .conftest import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = InfillVocabulary.of(PROTEIN)


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def log_p(model, row: list[int]) -> np.ndarray:
    """Of each token of a row but the first, given those before it."""
    with torch.no_grad():
        found = model(torch.tensor([row[:-1]], dtype=torch.long))[0].double().log_softmax(-1)
    return found.gather(1, torch.tensor(row[1:], dtype=torch.long)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("packing", [("data.packing=crop",), ("data.packing=concat", "data.reset=true")])
def test_an_evaluation_is_that_of_a_plain_loop_left_to_right_and_of_what_is_filled_in(trained, packing):
    source = find(trained("one", "model.objective=fim", *packing))
    (found,) = evaluate(source.run.path, Settings(bootstrap=0))
    assert list(found.splits) == list(json.loads(found.kept.read_text())["splits"]) == ["test", "test#infill"]
    (events,) = source.run.tensorboard_dir.glob("evaluation*")
    kept = read_curves(events)["test#infill/loss"]
    assert list(kept.values()) == pytest.approx([found.splits["test#infill"]["loss"]])
    model, samples = source.load(), samples_of(source, "test")
    whole, filled = [], []
    for number, window in enumerate(evaluation_windows(samples)):
        row = window.tokens(samples.encoder).tolist()
        segments = window.segments().tolist()
        for segment in set(segments):  # documents that do not see each other
            whole += log_p(model, [t for t, s in zip(row, segments, strict=True) if s == segment]).tolist()
        laid = plainly(row, number, 1.0, 0, 65, TOKENS)
        for document in _apart(laid):
            if TOKENS.middle in document:
                filled += log_p(model, document)[document.index(TOKENS.middle) :].tolist()
    for name, values in (("test", whole), ("test#infill", filled)):
        assert found.splits[name]["targets"] == len(values)
        assert found.splits[name]["loss"] == pytest.approx(-np.mean(values), rel=1e-5)


def _apart(row: list[int]) -> list[list[int]]:
    """Each begins with BOS, but for what is left of one at the beginning."""
    starts = sorted({0, *(at for at, token in enumerate(row) if token == BOS)})
    return [row[first:last] for first, last in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_an_exported_model_is_scored_on_files_both_ways_and_ids_keep_their_names(trained, longseq, folder):
    run = trained("one", "model.objective=fim")
    longseq("export", run, "out")
    (ours,) = evaluate(run, Settings(bootstrap=0, files=("test.fasta",), keep=False))
    (theirs,) = evaluate("out", Settings(bootstrap=0, files=("test.fasta",), keep=False))
    assert list(ours.splits) == ["test.fasta", "test.fasta#infill"]
    assert [part["loss"] for part in theirs.splits.values()] == [part["loss"] for part in ours.splits.values()]
    names = token_names(find("out").vocabulary)
    assert names[25:] == ["<bos>", "<eos>", "<pad>", "<mask>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    described = json.loads((folder / "out/config.json").read_text())
    assert described["vocab_size"] == 32
    assert described["architectures"] == ["LongseqForCausalLM"]


def test_a_score_is_the_log_likelihood_from_left_to_right(trained, folder):
    run = trained("one", "model.objective=fim")
    (folder / "two.fasta").write_text(">a\nMKLVWY\n>b\nAAC\n")
    model = find(run).load()
    wanted = [log_p(model, [BOS, *ids(text), EOS]).sum() for text in ("MKLVWY", "AAC")]
    assert [each.log_likelihood for each in score(run, "two.fasta")] == pytest.approx(wanted, rel=1e-5)


def test_a_gap_is_filled_as_a_plain_loop_fills_it_until_the_end(trained, longseq):
    run = trained("one", "model.objective=fim")
    model = find(run).load()
    row = [BOS, TOKENS.prefix, *ids("MK"), TOKENS.suffix, *ids("LVW"), TOKENS.middle]
    total, middle = 0.0, []
    while len(middle) < 9:
        with torch.no_grad():
            found = model(torch.tensor([row + middle]))[0, -1].double().log_softmax(-1)
        allowed = found.clone()
        allowed[[BOS, PROTEIN.pad, PROTEIN.mask, *range(29, 32)]] = -torch.inf
        middle.append(int(allowed.argmax()))
        total += float(found[middle[-1]])
        if middle[-1] == EOS:
            break
    drawn = next(sample(run, prompt="MK", suffix="LVW", temperature=0, length=9))
    letters = "".join(LETTERS[token] for token in middle if token != EOS)
    assert drawn.text == f"MK{letters}LVW"
    assert drawn.ended == (middle[-1] == EOS)
    assert drawn.log_likelihood == pytest.approx(total, rel=1e-5)
    shown = longseq("sample", run, "--infill", "MK<gap>LVW", "--length", 9, "--temperature", 0)
    assert shown.splitlines()[1] == drawn.text
    many = [each.text for each in sample(run, prompt="MK", suffix="LVW", number=20, length=9)]
    assert len(set(many)) > 5
    assert all(text.startswith("MK") and text.endswith("LVW") for text in many)


def test_a_gap_that_is_none_and_a_model_that_has_not_learned_to_fill_in_are_refused(trained, refused):
    run = trained("one", "model.objective=fim")
    assert "has 2 gaps: write one" in refused("sample", run, "--infill", "M<gap>K<gap>")
    assert "leave --prompt out" in refused("sample", run, "--infill", "M<gap>K", "--prompt", "M")
    with pytest.raises(LongseqError, match=r"was not trained to fill in \(model\.objective=causal\)"):
        sample(trained("two"), suffix="LV")


def test_what_cannot_be_filled_in_is_refused_before_a_training(folder):
    with pytest.raises(LongseqError, match=r"data\.fim_rate=1\.5.* must be at least 0 and below 1"):
        load_config("small.yaml", ["data.train=proteins.fasta", "model.objective=fim", "data.fim_rate=1.5"])
    config = load_config("small.yaml", ["data.train=proteins.fasta", "model.objective=fim", "data.batch_tokens=96"])
    config.data.tokenizer, config.data.packing, config.data.length, config.data.format = "pixels", "crop", 48, "images"
    with pytest.raises(LongseqError, match="an image has no end that a middle could be written to"):
        config.check()


def test_a_model_learns_to_write_what_the_suffix_says(folder):
    """Each document is a letter again and again: only what follows tells with which one it begins."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    (folder / "same.fasta").write_text("".join(f">{i}\n{letters[i % 20] * (8 + i % 5)}\n" for i in range(400)))
    alone = ("trainer.strategy=single", "trainer.valid_every=0", "trainer.probe_every=0", "optim.lr=0.01")
    how = ("data.packing=crop", "data.length=20", "data.batch_tokens=640", "data.fim_rate=0.9", "attention.kind=exact")
    words = ["data.train=same.fasta", "model.objective=fim", *TINY, *how, *alone, "trainer.max_steps=100"]
    config = load_config("small.yaml", [*words, "optim.warmup_steps=10", "run.name=same"])
    resolve_sources(config)
    run = Run.create(config, default_name="unused")
    run.record_data(identities(config))
    assert fit(run, config, None, StopFlag())
    found = {
        letter: next(sample(run.path, suffix=letter * 6, length=12)).text.removesuffix(letter * 6) for letter in letters
    }
    right = [set(text) <= {letter} for letter, text in found.items() if text]
    assert len(right) > 10
    assert np.mean(right) > 0.8
