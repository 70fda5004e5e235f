"""``longseq fit`` on a prepared corpus: killed, resumed, evaluated, and refused where the corpus is another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from command_line import Command, checkpoint, checkpoints, curve, largest_difference, longseq, weights_checksum
from longseq.config.loading import load_config
from longseq.data import identities, resolve_sources, split_spec
from longseq.runs.run import Run

pytestmark = pytest.mark.distributed

Fit = Callable[..., Path]
LAST = 24
BUCKETS = (
    *("data.train=corpus", "data.packing=bucket", "data.batch_tokens=3000", "data.ood=[]", "model.dropout=0.1"),
    *(f"trainer.max_steps={LAST}", "trainer.devices=2", "trainer.checkpoint_every=5", "model.objective=masked"),
)


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    """The proteins of the folder, and the others as ood."""
    (folder / "prepare.yaml").write_text("sources: [proteins.fasta, others.fasta]\nood_ids: others.txt\nworkers: 1\n")
    headers = [line for line in (folder / "others.fasta").read_text().splitlines() if line.startswith(">")]
    (folder / "others.txt").write_text("".join(f"{line.split()[0][1:]}\n" for line in headers))
    ended = longseq("data", "prepare", "prepare.yaml", "output=corpus", folder=folder)
    assert ended.code == 0, ended.err
    return folder / "corpus"


def samples(run: Path, step: int) -> int:
    return json.loads((checkpoint(run, step) / "manifest.json").read_text())["position"]["samples"]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, fit: Fit) -> Path:
    return fit("corpus-whole", *BUCKETS)


@pytest.fixture(scope="module")
def killed(corpus: Path, folder: Path) -> Path:
    """Killed after step 11 of 24, and resumed with worker processes."""
    command = Command("fit", "tiny.yaml", "run.name=corpus-killed", *BUCKETS, folder=folder)
    command.wait_for("step 11/")
    command.kill(command.workers()[1])
    assert command.end().code == 1
    run = folder / "runs" / "corpus-killed"
    assert checkpoints(run)[-1] in (10, 15, 20)  # it goes on while the kill is on its way
    ended = longseq("resume", "runs/corpus-killed", "data.workers=1", folder=folder)
    assert ended.code == 0, ended.err
    assert f"  epoch {curve(run, 'train/epoch')[LAST]:.2f}  " in ended.err
    return run


def test_a_killed_run_goes_on_to_the_same_weights(uninterrupted: Path, killed: Path) -> None:
    for tag in ("train/loss", "train/epoch"):
        assert curve(killed, tag) == curve(uninterrupted, tag)
    assert weights_checksum(killed, LAST) == weights_checksum(uninterrupted, LAST)
    assert samples(killed, LAST) == samples(uninterrupted, LAST)


def test_the_samples_of_a_bucketed_step_vary_and_are_counted(killed: Path) -> None:
    steps = checkpoints(killed)
    counts = {(samples(killed, b) - samples(killed, a)) / (b - a) for a, b in pairwise(steps)}
    assert len(counts) > 1
    assert min(counts) >= 3000 // 64 - 1


def test_the_epoch_is_the_share_of_the_corpus_that_was_seen(uninterrupted: Path) -> None:
    epochs = curve(uninterrupted, "train/epoch")
    records = split_spec(load_config(uninterrupted / "config.yaml"), "train").epoch_samples
    for step in checkpoints(uninterrupted):
        assert epochs[step] == pytest.approx(samples(uninterrupted, step) / records)


@pytest.mark.parametrize("packing", ["concat", "bucket"])
def test_two_processes_and_accumulation_have_the_losses_of_one(corpus: Path, fit: Fit, packing: str) -> None:
    few = ("data.train=corpus", "data.ood=[]", f"data.packing={packing}", "trainer.max_steps=8", "trainer.zero_stage=1")
    one = curve(fit(f"{packing}-one", *few), "train/loss")
    two = curve(fit(f"{packing}-two", *few, "trainer.devices=2", "trainer.accumulate=2"), "train/loss")
    assert len(one) == 8
    assert largest_difference(one, two) < 1e-4


def test_the_ood_split_of_the_corpus_is_evaluated(killed: Path, folder: Path) -> None:
    ended = longseq("evaluate", "runs/corpus-killed", "--json", folder=folder)
    assert ended.code == 0, ended.err
    splits = json.loads(ended.out)["splits"]
    assert set(splits) == {"test", "ood"}
    assert splits["ood"]["sequences"] > 100
    assert splits["ood"]["baseline"]["loss"] > 2


def test_another_corpus_under_the_same_name_is_refused_unless_accepted(
    fit: Fit, folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree(corpus, folder / "moving")
    few = ("data.train=moving", "data.ood=[]", "trainer.max_steps=3", "trainer.valid_every=0")
    fit("moving", *few)
    ended = longseq("data", "prepare", "prepare.yaml", "output=moving", "min_length=50", "--overwrite", folder=folder)
    assert ended.code == 0, ended.err
    refused = longseq("resume", "runs/moving", "trainer.max_steps=4", folder=folder)
    assert refused.code == 1
    assert refused.sentence.startswith(f"{folder / 'moving'} (data.train) has changed since the run was started")
    accepted = longseq("resume", "runs/moving", "trainer.max_steps=4", "data.accept_changes=true", folder=folder)
    assert accepted.code == 0, accepted.err
    run = Run.open(folder / "runs" / "moving")
    config = run.config()
    resolve_sources(config)
    run.check_data(config, identities(config))  # the accepted ones are now its own
    assert not config.data.accept_changes
