"""``longseq sample``: draws from the model's own probabilities, the same whatever else is drawn."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from Bio import SeqIO

from longseq.cli import main
from longseq.commands.sample import speed
from longseq.evaluation.generation import Settings, choose, draw
from longseq.evaluation.infilling import fill
from longseq.trained_model import find
from longseq_data.randomness import uniforms
from longseq_data.vocabulary import BOS, EOS, LETTERS, MASK, PAD, PROTEIN

SETTINGS = Settings(length=40, seed=3)


def drawn(source, number, settings=SETTINGS, prompt=(1, 2)):
    return list(draw(source.load(), source.vocabulary, source.begins, prompt, number, settings))


def log_probabilities(model, tokens):
    """Of every token after the first, by the forward pass over the whole sequence: teacher forcing."""
    with torch.no_grad():
        return model(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)


@pytest.mark.parametrize("attention", ["favor", "exact"])
def test_draws_and_likelihoods_are_those_of_the_forward_pass(trained, attention):
    source = find(trained("one", f"attention.kind={attention}"))
    model = source.load()
    ends = 0
    for each in drawn(source, 11):
        tokens = [BOS, *each.tokens, *([EOS] if each.ended else [])]
        forced = log_probabilities(model, tokens)
        total = forced[np.arange(len(forced)), tokens[1:]].sum()
        assert each.log_likelihood == pytest.approx(float(total), abs=1e-4)
        never = torch.zeros(29, dtype=torch.bool)
        never[[BOS, PAD, MASK]] = True
        places = np.arange(len(tokens) - 3)  # after the prompt of two
        again = choose(forced[2:], uniforms(3, "sample", (each.number << 32) + places), never, SETTINGS)
        assert again.tolist() == tokens[3:]
        ends += each.ended
    assert ends > 0


def test_a_sequence_is_the_same_however_many_are_drawn(trained):
    source = find(trained())
    many = drawn(source, 19)
    assert len({each.tokens for each in many}) > 10
    for number in (1, 8, 9):
        assert drawn(source, number) == many[:number]
    assert drawn(source, 3, replace(SETTINGS, seed=4)) != many[:3]


def test_temperature_0_takes_the_most_probable_token(trained):
    source = find(trained())
    (each,) = drawn(source, 1, replace(SETTINGS, temperature=0.0))
    forced = log_probabilities(source.load(), [BOS, *each.tokens])
    forced[:, [BOS, PAD, MASK]] = -torch.inf
    assert forced[2:].argmax(-1).tolist() == list(each.tokens[2:])


def test_the_smallest_temperatures_take_the_most_probable_token():
    likely = torch.tensor([[-3.0, -0.2, -4.0]]).log_softmax(-1)
    for temperature in (1e-300, 1e-320):
        settings = Settings(length=1, temperature=temperature)
        assert choose(likely, np.array([0.7]), torch.zeros(3, dtype=torch.bool), settings).tolist() == [1]


def test_top_k_and_top_p_leave_the_tokens_that_they_say():
    """By frequencies: every draw among the allowed tokens, in the proportions of their probabilities."""
    probability = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    rows = 20_000
    scores = probability.log().expand(rows, -1)
    uniform, never = uniforms(0, "test", np.arange(rows)), torch.zeros(5, dtype=torch.bool)
    for settings, allowed in (
        (Settings(1), [0, 1, 2, 3, 4]),
        (Settings(1, top_k=2), [1, 3]),
        (Settings(1, top_p=0.71), [1, 3, 4]),
        (Settings(1, top_p=0.69), [1, 3]),
        (Settings(1, top_p=0.01), [1]),
        (Settings(1, top_k=4, top_p=0.9), [1, 3, 4, 2]),
    ):
        shares = np.bincount(choose(scores, uniform, never, settings), minlength=5) / rows
        expected = torch.zeros(5)
        expected[allowed] = probability[allowed] / probability[allowed].sum()
        np.testing.assert_allclose(shares, expected.numpy(), atol=0.012)
    never[1] = True
    assert 1 not in choose(scores, uniform, never, Settings(1))
    sharp = np.bincount(choose(scores, uniform, torch.zeros(5, dtype=torch.bool), Settings(1, temperature=0.5))) / rows
    np.testing.assert_allclose(sharp, (probability**2 / (probability**2).sum()).numpy(), atol=0.012)


def test_sample_writes_fasta_with_seed_run_step_and_likelihood(trained, longseq, folder):
    run = trained()
    text = longseq("sample", run, "--number", 9, "--seed", 5, "--prompt", "mkv", "--length", 100)
    records = list(SeqIO.parse(io.StringIO(text), "fasta"))
    assert [record.id for record in records] == [f"sample-{number}" for number in range(9)]
    (folder / "drawn.fasta").write_text(text)
    scores = [line.split("\t") for line in longseq("score", run, "drawn.fasta").splitlines()[1:]]
    for record, (name, length, score, *_) in zip(records, scores, strict=True):
        assert record.seq.startswith("MKV")
        facts = dict(word.split("=") for word in record.description.split()[1:])
        assert (facts["seed"], facts["run"], facts["step"]) == ("5", "one", "20")
        assert (record.id, len(record.seq)) == (name, int(length))
        if facts["ended"] == "eos":  # `score` counts the end
            assert float(facts["log_likelihood"]) == pytest.approx(float(score), abs=1e-3)
    longseq("sample", run, "--number", 9, "--seed", 5, "--prompt", "mkv", "--length", 100, "--out", "out.fasta")
    assert (folder / "out.fasta").read_text() == text


def test_timing_compares_the_beginning_and_the_end_of_the_first_block():
    steps = [*[0.002] * 999, 9.0, *[0.5] * 500, *[0.0015] * 1000]  # the median leaves one slow token out
    clock = list(accumulate(steps, initial=7.0))
    another = [clock[-1] + 50 * at for at in range(1, 2502)]
    assert speed(clock + another, len(clock)) == (
        "longseq: 2,501 tokens of 8 sequences at once: median 2.000 ms for the first 1,000, 1.500 ms for the last "
        "1,000 (-25.0%)"
    )
    few = list(accumulate([0.004, 0.004, 0.001, 0.005, 0.005], initial=0.0))
    assert "median 4.000 ms for the first 3, 5.000 ms for the last 3 (+25.0%)" in speed(few, 6)


def test_timing_draws_every_token_and_says_how_long_they_took(trained, capsys):
    words = ["sample", str(trained()), "--length", "40", "--number", "9"]
    assert main(words) == 0
    assert "ended=eos" in capsys.readouterr().out
    assert main([*words, "--timing"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("tokens=40 ") == 9
    assert re.search(r"40 tokens of 8 sequences at once: median [\d.]+ ms for the first 20, [\d.]+ ms", shown.err)


def test_text_models_write_text(trained, longseq, folder):
    (folder / "book.txt").write_text("It was a bright cold day in April.\n" * 40)
    data = ("data.train=book.txt", "data.test=book.txt", "data.format=text", "data.packing=concat")
    out = longseq("sample", trained("book", *data), "--prompt", "It was", "--length", 9)
    header, text = out.split("\n", 1)
    assert header.startswith("=== sample-0 seed=0 run=book step=20 ")
    assert text.startswith("It was")


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_infilling_leaves_the_rest_and_takes_the_surest_first(trained, rounds):
    source = find(trained("masked", "model.objective=masked"))
    model = source.load()
    tokens = [0, MASK, 2, 3, MASK, 5, 6, MASK, 8]
    row = torch.tensor([[BOS, *tokens, EOS]])
    left = [2, 5, 8]
    for passes in range(rounds or 3, 0, -1):
        with torch.no_grad():
            logits = model(row)[0]
        best = sorted(left, key=lambda at: -float(logits[at].log_softmax(-1)[:25].max()))[: -(-len(left) // passes)]
        for at in best:
            row[0, at] = logits[at, :25].argmax()
            left.remove(at)
    filled = fill(model, PROTEIN, source.begins, tokens, rounds, Settings(1, temperature=0.0))
    assert list(filled.tokens) == row[0, 1:-1].tolist()
    assert MASK not in filled.tokens


def test_infill_keeps_names_and_known_residues(trained, longseq, folder):
    run = trained("masked", "model.objective=masked")
    (folder / "holes.fasta").write_text(">a b\nMK?L\n>c\n??\n")
    records = list(SeqIO.parse(io.StringIO(longseq("sample", run, "--infill", "holes.fasta")), "fasta"))
    assert [record.id for record in records] == ["a", "c"]
    assert (records[0].seq[:2], records[0].seq[3]) == ("MK", "L")
    assert set(records[0].seq + records[1].seq) <= set(LETTERS)


def test_what_cannot_be_sampled_is_refused(trained, refused, folder):
    causal, masked = trained(), trained("masked", "model.objective=masked")
    assert "'*' at position 4 is not one of" in refused("sample", causal, "--prompt", "MKV*")
    assert "model.objective=masked" in refused("sample", masked)
    (folder / "holes.fasta").write_text(">a b\nMK?L\n")
    assert "model.objective=causal" in refused("sample", causal, "--infill", "holes.fasta")
    assert "not UTF-8" in refused("sample", causal, "--prompt", "MK\udcff")
    (folder / "odd.fasta").write_text(">a b\nmk?\nL*L\n")
    assert "odd.fasta, line 3: '*' in record 'a'" in refused("sample", masked, "--infill", "odd.fasta")
    (folder / "whole.fasta").write_text(">a\nMKV\n")
    assert "no '?' in any record" in refused("sample", masked, "--infill", "whole.fasta")
    assert "does not exist" in refused("sample", causal, "--out", "nowhere/out.fasta")
    for words in (["--prompt", "MKV"], ["--length", "9"], ["--number", "2"], ["--timing"]):
        assert f"leave {words[0]} out" in refused("sample", masked, "--infill", "holes.fasta", *words)
    assert "--infill is missing" in refused("sample", causal, "--rounds", "2")
