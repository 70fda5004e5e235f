"""``longseq evaluate`` on a run that was trained by two processes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from Bio import SeqIO

from command_line import Ended, checkpoint, curve, longseq
from corpora import by_sequence

pytestmark = pytest.mark.distributed

FRACTIONS = (0.05, 0.05)  # data.valid_fraction and data.test_fraction


@pytest.fixture(scope="module")
def run(two_processes: Callable[[int], Path]) -> Path:
    return two_processes(3)


@pytest.fixture(scope="module")
def report(run: Path, folder: Path) -> dict:
    ended = longseq(
        *("evaluate", run, "--json", "--split", "valid", "--split", "test", "--split", "ood"), folder=folder
    )
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def table(run: Path, folder: Path) -> Ended:
    return longseq("evaluate", run, folder=folder)


def test_validation_loss_is_that_of_the_training(folder: Path, run: Path) -> None:
    """The same sample of the same size: data.valid_samples is 256."""
    ended = longseq("evaluate", run, "--split", "valid", "--sequences", "256", "--json", folder=folder)
    scores = json.loads(ended.out)["splits"]["valid"]
    assert scores["loss"] == pytest.approx(curve(run, "valid/loss")[20], abs=1e-5)
    assert scores["accuracy"] == pytest.approx(curve(run, "valid/accuracy")[20], abs=1e-6)


def test_table_shows_test_and_ood_beside_the_baseline(table: Ended, report: dict) -> None:
    assert table.code == 0, table.err
    rows = {line.split()[0]: line.split() for line in table.out.splitlines() if line.startswith(("test", "ood"))}
    for split in ("test", "ood"):
        scores = report["splits"][split]
        low, high = scores["intervals"]["loss"]
        assert low < scores["loss"] < high
        shown = [f"{scores['loss']:.4f}", f"{low:.4f}–{high:.4f}", f"{scores['perplexity']:.2f}"]
        shown += [f"{scores['bits']:.4f}", f"{scores['accuracy']:.1%}", f"{scores['top_5_accuracy']:.1%}"]
        shown += [f"{scores['ece']:.3f}"]
        shown += [f"{scores['baseline']['perplexity']:.2f}", f"{scores['baseline']['accuracy']:.1%}"]
        assert rows[split][3:] == shown


def test_json_is_kept_in_the_run(run: Path, table: Ended, report: dict) -> None:
    kept = {path.name: json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")}
    assert kept["step-00000020-valid-test-ood.json"] == report
    # Another command, the same numbers to the last bit.
    assert kept["step-00000020-test-ood.json"]["splits"]["test"] == report["splits"]["test"]
    assert kept["step-00000020-test-ood.json"]["splits"]["ood"] == report["splits"]["ood"]


def test_three_processes_find_what_one_does_to_the_last_bit(run: Path, folder: Path, report: dict) -> None:
    """And of a checkpoint that is named."""
    ended = longseq("evaluate", checkpoint(run, 20), "--devices", "3", "--json", folder=folder)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["splits"] == {split: report["splits"][split] for split in ("test", "ood")}


def test_baseline_is_an_independent_count(folder: Path, report: dict) -> None:
    """Causal targets are every residue and an EOS a record; one is added to each of the 29 training counts."""
    train: Counter[str] = Counter()
    test: Counter[str] = Counter()
    for record in SeqIO.parse(folder / "proteins.fasta", "fasta"):
        counts = {"train": train, "test": test}.get(by_sequence(record.id, str(record.seq), *FRACTIONS))
        if counts is not None:
            counts.update([*str(record.seq), "EOS"])
    total = sum(train.values()) + 29
    loss = -sum(n * math.log((train[letter] + 1) / total) for letter, n in test.items()) / sum(test.values())
    scores = report["splits"]["test"]
    assert scores["targets"] == sum(test.values())
    assert scores["baseline"]["loss"] == pytest.approx(loss, abs=1e-9)
    assert scores["baseline"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-9)
    assert scores["baseline"]["accuracy"] == pytest.approx(test[train.most_common(1)[0][0]] / sum(test.values()))


def test_a_bad_ood_file_is_refused_before_anything_is_scored(folder: Path, run: Path) -> None:
    (folder / "bad.fasta").write_text(">a\nMKVJ\n>nothing\n")
    before = set((run / "evaluations").glob("*"))
    ended = longseq("evaluate", run, "data.ood=bad.fasta", folder=folder)
    assert ended.code == 1
    assert f"{folder}/bad.fasta, line 3" in ended.sentence
    assert set((run / "evaluations").glob("*")) == before


def test_letters_read_as_x_are_said_in_an_evaluation_too(folder: Path, run: Path) -> None:
    (folder / "odd.fasta").write_text(">a\nMKVJMKV\n")
    ended = longseq("evaluate", run, "--split", "ood", "data.ood=odd.fasta", folder=folder)
    assert ended.code == 0, ended.err
    assert "read as X: 'J' × 1" in ended.err
