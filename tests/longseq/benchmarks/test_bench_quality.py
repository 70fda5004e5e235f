"""``longseq bench quality`` and ``bench recall``: what they train, keep and say."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from longseq.benchmarks import quality, recall
from longseq.benchmarks.variants import VARIANTS
from longseq.cli import main
from longseq.models.performer import PerformerLM

TINY = quality.QualityRequest(length=17, batch=2, steps=3, window=4, features=6, dim=16, depth=1, heads=2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(0).choices("abc d", k=1500)))
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_model_that_learns_something(variant):
    model = PerformerLM(quality.spec_of(TINY, variant, 5, seed=0))
    model(torch.randint(5, (2, 17))).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_trial_is_kept_and_repeats_exactly(text, tmp_path):
    ids = quality.read_text([text])
    folders = [tmp_path / "a", tmp_path / "b"]
    told: list[list[str]] = [[], []]
    for folder, lines in zip(folders, told, strict=False):
        quality.measure(TINY, ids, ["window-share-decay"], [1], folder, lines.append)
    first, second = (quality.trials(TINY, ids, folder) for folder in folders)
    assert [(t.valid, t.train) for t in first] == [(t.valid, t.train) for t in second]
    again: list[str] = []
    assert quality.measure(TINY, ids, ["window-share-decay"], [1], folders[0], again.append) == first
    assert len(again) == 1  # nothing was trained
    other = dataclasses.replace(TINY, steps=4)
    assert quality.trials(other, ids, folders[0]) == []


def test_the_held_out_tenth_is_never_trained_on(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "b" * 100)
    ids = quality.read_text([path])
    assert ids.train.unique().tolist() == [0]
    assert len(ids.train) == 900
    assert len(ids.valid) == 100


def test_bench_quality_prints_mean_and_spread(text, tmp_path, capsys):
    arguments = [
        "--variants",
        "exact,local",
        "--seeds",
        "0,1",
        "--length",
        "16",
        "--batch",
        "2",
        "--steps",
        "2",
        "--features",
        "8",
        "--threads",
        "1",
    ]
    assert main(["bench", "quality", str(text), *arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "2 steps of 2 × 16 characters" in out
    assert "exact" in out
    assert "local" in out
    assert len(list((tmp_path / "out" / "trials").glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"\xff\xfe\xff", "as UTF-8 text"), (b"short", "too little text for --length 512")]
)
def test_text_that_will_not_do_is_refused(content, sentence, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert main(["bench", "quality", str(path), "--out", str(tmp_path / "out")]) == 1
    assert sentence in capsys.readouterr().err


def test_an_answer_lies_at_the_distance_of_its_question():
    request = recall.RecallRequest()
    ids, targets = recall.sequences(request, 100, 50, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (50, 100 + request.pairs)
    assert (targets[:, : -request.pairs] == -100).all()
    distances = []
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=False):
        pairs = {(pair - 1 - request.keys) // request.values: at for at, pair in enumerate(row[: request.pairs])}
        for at in range(100, 100 + request.pairs):
            shown_at = pairs[row[at] - 1]
            assert (row[shown_at] - 1 - request.keys) % request.values == wanted[at]
            distances.append(at - shown_at)
    assert sum(distances) / len(distances) == 100


def test_bench_recall_prints_a_column_a_distance(tmp_path, capsys):
    arguments = [
        "--variants",
        "exact,window",
        "--distances",
        "8,40",
        "--steps",
        "2",
        "--more-steps",
        "1",
        "--features",
        "8",
        "--threads",
        "1",
    ]
    assert main(["bench", "recall", *arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "at 8" in out
    assert "at 40" in out
    assert "window" in out
    (path,) = (tmp_path / "trials").glob("*-exact-0.json")
    kept = json.loads(path.read_text())
    assert [result["steps"] for result in kept["results"]] == [2, 1]
    assert main(["bench", "recall", "--distances", "3", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("benchmark", ["attention", "step", "features"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(benchmark, text, capsys):
    assert main(["bench", benchmark, "--out", str(text / "in")]) == 1
    assert "is not a folder that can be written to" in capsys.readouterr().err


def test_attention_options_that_exclude_each_other_are_a_sentence(text, tmp_path, capsys):
    arguments = ["--variants", "hyperbolic", "--features", "7", "--length", "16", "--out", str(tmp_path / "out")]
    assert main(["bench", "quality", str(text), *arguments]) == 1
    assert "attention.features=7 is odd" in capsys.readouterr().err
