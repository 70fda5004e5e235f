"""``longseq fit``, ``resume`` and ``evaluate`` on text and on images, in processes of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import checkpoint, curve, longseq

pytestmark = pytest.mark.distributed

# 2 blocks of width 32; 8 sequences × 64 tokens = 512 tokens a step
TINY = """
model: {dim: 32, depth: 2, heads: 2, ffn_dim: 64}
attention: {features: 32, redraw_every: 7}
data: {length: 64, batch_tokens: 512, part_bytes: 400, valid_samples: 8, valid_fraction: 0.1, test_fraction: 0.2}
optim: {lr: 0.003, warmup_steps: 5, schedule: constant}
trainer: {accelerator: cpu, max_steps: 10, valid_every: 5, checkpoint_every: 0, log_every: 1}
"""
SIZE = 5
PICTURES = ["data.packing=crop", f"data.image_size={SIZE}", "data.length=75", "data.batch_tokens=600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.yaml, a book of 400 lines, and 60 small pictures in two folders."""
    folder = tmp_path_factory.mktemp("text and pixels")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "book.txt").write_text("".join(f"Line {i}: the naïve fox said {i * i}, twice.\n" for i in range(400)))
    rng = np.random.default_rng(0)
    for i in range(60):
        path = folder / "pictures" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return folder


def fit(folder: Path, name: str, *overrides: str) -> Path:
    ended = longseq("fit", "tiny.yaml", f"run.name={name}", *overrides, folder=folder)
    assert ended.code == 0, ended.err
    return folder / "runs" / name


def evaluate(folder: Path, run: Path) -> dict:
    ended = longseq("evaluate", run, "--json", folder=folder)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["splits"]["test"]


@pytest.fixture(scope="module")
def bytes_run(folder: Path) -> Path:
    book = ("data.train=book.txt", "data.test=book.txt", "data.reset=true")
    return fit(folder, "bytes", *book, "trainer.checkpoint_every=5")


def test_bytes_are_learned_and_evaluated_in_bits_a_byte_and_words(folder, bytes_run):
    losses = curve(bytes_run, "train/loss")
    assert losses[10] < losses[1] - 0.3
    scores = evaluate(folder, bytes_run)
    data = (folder / "book.txt").read_bytes()
    assert (scores["bytes"], scores["words"]) == (len(data), len(data.split()))
    documents = scores["targets"] - len(data)  # an EOS each
    assert documents >= len(data) // 400
    nats = scores["loss"] * scores["targets"]
    assert scores["bits_per_byte"] == pytest.approx(nats / len(data) / math.log(2), rel=1e-6)
    assert scores["word_perplexity"] == pytest.approx(math.exp(nats / len(data.split())), rel=1e-6)
    assert scores["tokens_per_word"] == pytest.approx(scores["targets"] / scores["words"])
    assert 4 < scores["bits_per_byte"] < 8.1


def test_two_processes_with_workers_train_the_same_on_text(folder, bytes_run):
    same = ["data.train=book.txt", "data.test=book.txt", "data.reset=true"]
    two = fit(folder, "two", *same, "trainer.devices=2", "data.workers=1")
    alone, shared = curve(bytes_run, "train/loss"), curve(two, "train/loss")
    assert max(abs(alone[step] - shared[step]) for step in alone) < 1e-5


def test_text_goes_on_after_a_resume_as_if_never_stopped(folder, bytes_run, stopped):
    run = stopped(bytes_run, "half", 5)
    ended = longseq("resume", run, folder=folder)
    assert ended.code == 0, ended.err
    whole, halves = curve(bytes_run, "train/loss"), curve(run, "train/loss")
    assert max(abs(whole[step] - halves[step]) for step in whole) < 1e-6
    assert checkpoint(run, 10).is_dir()


def test_another_reading_of_the_text_is_no_resume(folder, bytes_run):
    for change in ("data.reset=false", "data.tokenizer=bytes", "data.part_bytes=500", "data.format=lines"):
        refused = longseq("resume", bytes_run, "trainer.max_steps=12", change, folder=folder)
        assert refused.code == 1
        assert refused.sentence.lower().startswith(f"{change}: the run")


def test_a_trained_tokenizer_counts_the_same_bytes_and_words(folder):
    made = longseq(
        *("data", "tokenizer", "words.json", "book.txt", "--model", "unigram", "--size", "300"), folder=folder
    )
    assert made.code == 0, made.err
    run = fit(folder, "words", "data.train=book.txt", "data.test=book.txt", "data.tokenizer=words.json")
    scores = evaluate(folder, run)
    data = (folder / "book.txt").read_bytes()
    assert (scores["bytes"], scores["words"]) == (len(data), len(data.split()))
    assert scores["targets"] < len(data)
    (folder / "words.json").unlink()  # the run has kept its own
    table = longseq("evaluate", run, folder=folder).out
    assert "bits per byte   word perplexity" in table
    assert f"{scores['bits_per_byte']:.5g}" in table


def test_images_are_learned_and_evaluated_in_bits_a_dimension(folder):
    run = fit(folder, "pictures", "data.train=pictures", *PICTURES)
    scores = evaluate(folder, run)
    assert scores["targets"] == scores["dimensions"] == scores["sequences"] * SIZE * SIZE * 3
    assert scores["bits_per_dimension"] == pytest.approx(scores["loss"] / math.log(2))
    assert scores["bits_per_dimension"] == pytest.approx(8, abs=0.3)  # noise
    assert "bits per dimension" in longseq("evaluate", run, folder=folder).out


def test_a_hub_dataset_of_images_is_trained_with_workers(folder):
    hub = ["data.train=hub:pictures", "data.tokenizer=pixels", "data.workers=2"]
    run = fit(folder, "hub", *hub, *PICTURES, "trainer.max_steps=2")
    assert curve(run, "train/loss")[2] == pytest.approx(math.log(256), abs=0.3)
