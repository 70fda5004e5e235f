"""Verbs as functions: ``longseq.fit`` and the others return what the command line prints."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import longseq as api
from longseq.errors import LongseqError


def test_an_evaluation_is_what_the_command_prints_and_keeps(trained, longseq):
    run = trained()
    settings = api.EvaluationSettings(splits=("test", "train"), sequences=5, bootstrap=20)
    (evaluation,) = api.evaluate([run], settings)
    printed = json.loads(
        longseq("evaluate", run, "--json", "--split", "test", "--split", "train", "--sequences", 5, "--bootstrap", 20)
    )
    assert evaluation.as_dict() == printed
    assert json.loads(evaluation.kept.read_text()) == printed
    assert evaluation.splits["test"]["sequences"] == 5


def test_an_evaluation_that_is_not_to_be_kept_leaves_nothing(trained):
    run = trained()
    before = sorted(run.rglob("*"))
    (evaluation,) = api.evaluate([run], api.EvaluationSettings(keep=False, bootstrap=0))
    assert evaluation.kept is None
    assert sorted(run.rglob("*")) == before


def test_scores_are_those_of_the_command(trained, longseq):
    run = trained()
    rows = [json.loads(json.dumps(each.as_dict())) for each in api.score(run, "test.fasta")]
    assert rows == json.loads(longseq("score", run, "test.fasta", "--json"))
    assert len(rows) == 30


def test_effects_are_those_of_the_command(trained, longseq, folder):
    run = trained("one", "model.objective=masked")
    (folder / "wild.fasta").write_text(">wild\nMKVLAACDEF\n")
    rows = [each.as_dict() for each in api.variant_effects(run, "wild.fasta", ["M1A", "K2C:V3D"])]
    words = ("score", run, "wild.fasta", "--variant", "M1A", "--variant", "K2C:V3D", "--json")
    assert rows == json.loads(longseq(*words))
    assert [row["changes"] for row in rows] == [1, 2]


def test_samples_are_those_of_the_command(trained, longseq):
    run = trained()
    samples = list(api.sample(run, prompt="MK", number=3, length=12, seed=4))
    printed = longseq("sample", run, "--prompt", "MK", "--number", 3, "--length", 12, "--seed", 4)
    records = [record.split("\n", 1) for record in printed.split(">")[1:]]
    assert [each.text for each in samples] == [sequence.replace("\n", "") for _, sequence in records]
    for each, (head, _) in zip(samples, records, strict=True):
        assert f"log_likelihood={each.log_likelihood:.4f}" in head


def test_infilled_records_are_those_of_the_command(trained, longseq, folder):
    run = trained("one", "model.objective=masked")
    (folder / "hidden.fasta").write_text(">a\nMK?LA\n>b\n??VL\n")
    filled = list(api.infill(run, "hidden.fasta"))
    printed = longseq("sample", run, "--infill", "hidden.fasta")
    assert [each.text for each in filled] == printed.splitlines()[1::2]
    assert [(each.id, each.hidden) for each in filled] == [("a", 1), ("b", 2)]


def test_vectors_are_those_of_the_command(trained, longseq, folder):
    run = trained()
    vectors = list(api.embed(run, "test.fasta", layer=1))
    longseq("embed", run, "test.fasta", "--layer", 1, "--out", "v.npz")
    with np.load(folder / "v.npz") as kept:
        assert np.array_equal(kept["mean"], np.stack([each.mean for each in vectors]))
    assert [len(each.residues) for each in vectors] == list(range(1, 90, 3))


def test_an_export_opens_as_the_model_that_it_was(trained, folder):
    run = trained()
    assert api.export(run, folder / "out") == folder / "out"
    assert [s.log_likelihood for s in api.score("out", "test.fasta")] == [
        s.log_likelihood for s in api.score(run, "test.fasta")
    ]
    with pytest.raises(LongseqError, match="exists already"):
        api.export(run, folder / "out")


def test_a_model_that_cannot_is_refused_before_anything_is_computed(trained):
    masked = trained("one", "model.objective=masked")
    with pytest.raises(LongseqError, match="sample continues with causal models"):
        api.sample(masked)
    with pytest.raises(LongseqError, match="take 0 to 2"):
        api.embed(masked, "test.fasta", layer=3)


def test_files_are_paths_or_words_and_one_model_needs_no_list(trained, folder):
    run = trained()
    (one,) = api.evaluate(run, api.EvaluationSettings(files=(folder / "test.fasta",), keep=False, bootstrap=0))
    (other,) = api.evaluate([str(run)], api.EvaluationSettings(files=("test.fasta",), keep=False, bootstrap=0))
    assert one == other
    source = api.find(str(run))
    assert list(api.score(source, folder / "test.fasta")) == list(api.score(run, "test.fasta"))
    (folder / "wild.fasta").write_text(">wild\nMKVLAACDEF\n")
    (folder / "list.txt").write_text("K2C\n")
    by_table = list(api.variant_effects(source, folder / "wild.fasta", table="list.txt"))
    assert by_table == list(api.variant_effects(run, "wild.fasta", ["K2C"]))
    assert [v.identifier for v in api.embed(source, folder / "wild.fasta")] == ["wild"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda run: api.sample(run, number=0), "number=0: take 1 or more."),
        (lambda run: api.sample(run, length=0), "length=0: take 1 or more."),
        (lambda run: api.sample(run, temperature=-1), "temperature=-1: take 0 or more."),
        (lambda run: api.sample(run, temperature=float("nan")), "temperature=nan: take 0 or more."),
        (lambda run: api.sample(run, top_p=0), "top_p=0: take a share above 0 and at most 1."),
        (lambda run: api.infill(run, "test.fasta", rounds=-1), "rounds=-1: take 0 or more."),
        (lambda run: api.score(run, "test.fasta", passes=-2), "passes=-2: take 0 or more."),
        (lambda run: api.embed(run, "test.fasta", layer=-1), "layer=-1: one has 2 blocks; take 0 to 2."),
        (lambda run: api.evaluate(run, api.EvaluationSettings(devices=0)), "devices=0: take 1 or more."),
        (lambda run: api.score(run, "test.fasta", ema=True), "holds no running mean of the weights: leave ema out,"),
        (lambda run: api.sample(run, prompt="M*"), "prompt: '*' at position 2 is not one of"),
    ],
)
def test_an_argument_out_of_bounds_is_refused_by_its_own_name(trained, call, sentence):
    with pytest.raises(LongseqError) as refused:
        call(trained())
    assert sentence in str(refused.value)
    assert "--" not in str(refused.value)


def test_a_training_runs_in_a_thread_and_leaves_its_process_as_it_was(folder):
    def state():
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        return [Path.cwd(), dict(os.environ), *map(signal.getsignal, signals), logging.getLogger().handlers]

    words = ["data.train=proteins.fasta", "trainer.strategy=single", "trainer.max_steps=1", "data.valid_fraction=0.2"]
    before = state()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(api.fit, "small.yaml", [*words, "run.name=mine"]).result()
    assert training.finished
    assert state() == before


def test_a_training_returns_its_run_and_goes_on(folder):
    words = ["data.train=proteins.fasta", "run.name=mine", "trainer.strategy=single", "trainer.max_steps=2"]
    words += ["data.valid_fraction=0.2", "data.test_fraction=0"]
    training = api.fit(folder / "small.yaml", words)
    assert training.finished
    assert (training.run.path, training.checkpoint.step) == (folder / "runs" / "mine", 2)
    assert training.report[0].startswith("Finished: step 2 of 2")
    more = api.resume(training.run.path, ["trainer.max_steps=3"])
    assert more.checkpoint.step == 3
    with pytest.raises(LongseqError, match="finished at step 3"):
        api.resume(training.run.path)


def test_the_package_imports_nothing_before_a_function_is_asked_for():
    code = (
        "import sys, longseq; heavy = {'torch', 'numpy', 'yaml', 'pyarrow'} & set(sys.modules);"
        "print(sorted(heavy), sorted(set(longseq.__all__) - set(dir(longseq))), hasattr(longseq, 'nothing'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] [] False"


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_is_there(name):
    assert callable(getattr(api, name))
    assert getattr(api, name).__doc__
