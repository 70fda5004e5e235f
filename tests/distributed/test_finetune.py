"""`longseq finetune` as it is typed: on one process and on two, stopped and gone on with."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from command_line import checkpoint, longseq
from longseq.runs.curves import read_curves

pytestmark = pytest.mark.distributed

WORDS = ("--learn", "lora", "--batch", "8", "--bootstrap", "20", "optim.warmup_steps=1", "trainer.log_every=1")
STEPS = ("trainer.max_steps=6", "trainer.valid_every=2", "trainer.keep_checkpoints=9", "optim.schedule=constant")


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    """60 sequences, and the share of A in each."""
    rng = np.random.default_rng(2)
    path = folder / "labels.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sequence", "share"])
        for _ in range(60):
            letters = "".join(rng.choice(list("ACDEFGHIKL"), size=rng.integers(5, 40)))
            rows.writerow([letters, f"{letters.count('A') / len(letters):.4f}"])
    return path


@pytest.fixture(scope="module")
def seeds(one_process: Path, table: Path, folder: Path) -> list[Path]:
    """The runs of two seeds, of one process each."""
    ended = longseq("finetune", one_process, table, "--seeds", 2, *WORDS, *STEPS, "run.name=alone", folder=folder)
    assert ended.code == 0, ended.err
    assert "over 2 seeds" in ended.out
    return [folder / f"runs/alone-seed{seed}" for seed in (0, 1)]


@pytest.fixture(scope="module")
def alone(seeds: list[Path]) -> Path:
    return seeds[0]


def test_seeds_learn_otherwise_from_the_same_rows(seeds):
    (one,), (other,) = (run.glob("evaluations/*.json") for run in seeds)
    reports = [json.loads(path.read_text()) for path in (one, other)]
    for split in ("valid", "test"):
        first, second = (report["splits"][split] for report in reports)
        assert first["labels"] == second["labels"] > 2
        assert first["mse"] != second["mse"]


def test_two_processes_with_zero_2_have_the_losses_of_one(alone, one_process, table, folder):
    two = ("trainer.devices=2", "trainer.zero_stage=2", "trainer.accumulate=2", "run.name=two")
    ended = longseq("finetune", one_process, table, *WORDS, *STEPS, *two, folder=folder)
    assert ended.code == 0, ended.err
    curves = [read_curves(run / "tensorboard") for run in (alone, folder / "runs/two")]
    for name in ("train/loss", "valid/loss", "train/gradient_norm"):
        one, other = (each[name] for each in curves)
        assert one.keys() == other.keys()
        assert list(other.values()) == pytest.approx(list(one.values()), rel=2e-4)
    assert len(curves[0]["train/loss"]) == 6
    assert len(curves[0]["valid/loss"]) == 3


def test_a_run_that_goes_on_repeats_what_it_would_have_done(alone, stopped):
    half = stopped(alone, "half", 4)
    ended = longseq("resume", half, folder=half.parent.parent)
    assert ended.code == 0, ended.err
    for name in ("model.safetensors", "training/rank-00000.safetensors"):
        assert (checkpoint(half, 6) / name).read_bytes() == (checkpoint(alone, 6) / name).read_bytes()
