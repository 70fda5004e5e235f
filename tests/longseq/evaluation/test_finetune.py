"""Labels: `longseq finetune` before it trains, `predict`, `evaluate` and what else takes such a run."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import longseq as api
from longseq.config.loading import load_config, save_config
from longseq.errors import ConfigError, LongseqError, RunError
from longseq.evaluation.finetune import Finetuning, configured
from longseq.evaluation.label_measures import of_classes, of_numbers, summary
from longseq.evaluation.label_outputs import told
from longseq.evaluation.records import records
from longseq.launch.before import check_origin
from longseq.measure.peaks import PeakMeter
from longseq.runs import checkpoint
from longseq.trained_model import find
from longseq.training.shards import write
from longseq_data.vocabulary import IGNORE
from positions import position


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def letters_of(table: str) -> list[str]:
    return [row["sequence"] for row in rows_of(Path(table).read_text())]


@pytest.mark.parametrize("label", ["share", "kind", "states"])
def test_predictions_come_in_the_order_of_the_input_whatever_the_batch(tuned, table, longseq, folder, label):
    run = tuned(label, "head", steps=10).path
    lines = rows_of(longseq("predict", run, table))
    assert [row["id"] for row in lines] == [str(number + 1) for number in range(90)]
    small = list(api.predict(run, table, batch_tokens=1))
    (folder / "table.fasta").write_text("".join(f">p{i}\n{s}\n" for i, s in enumerate(letters_of(table))))
    other = list(api.predict(run, "table.fasta", batch_tokens=100_000))
    assert [each.identifier for each in other] == [f"p{number}" for number in range(90)]
    for row, one, two, letters in zip(lines, small, other, letters_of(table), strict=True):
        if label == "share":
            assert [float(row["prediction"]), two.value] == pytest.approx([one.value] * 2, abs=1e-5)
        else:
            assert row["prediction"] == one.value == two.value
        if label == "kind":
            shares = [float(row[f"probability of {name}"]) for name in ("little", "much")]
            assert shares == pytest.approx(list(one.probabilities.values()), abs=1e-5)
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert (shares[0] > shares[1]) == (row["prediction"] == "little")
        if label == "states":
            assert len(row["prediction"]) == len(letters)
            assert set(row["prediction"]) <= set("HE-")
    assert len({str(each.value) for each in small}) > 1
    Path("table.txt").write_text(Path(table).read_text())  # read by what it is, as the table that was learned from
    assert list(api.predict(run, "table.txt")) == list(api.predict(run, table))


@pytest.mark.parametrize("label", ["share", "kind", "states"])
def test_a_long_record_is_labelled_in_tiles_as_in_one_pass(tuned, label, folder):
    run, rng, peaks = tuned(label, "head", "model.sequence_tile=512"), np.random.default_rng(5), {}
    for length in (5000, 20_000):
        letters = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=length))
        (folder / "long.fasta").write_text(f">long\n{letters}\n")
        source = find(run.path)
        row = next(records(source, "long.fasta")).row
        meter = PeakMeter(torch.device("cpu"))
        ((record, made),) = told(source, records(source, "long.fasta"))
        peaks[length] = meter.stop() - made.nbytes
        model = source.load(tuned=True).double()
        with torch.inference_mode():
            wanted = model(torch.from_numpy(row.astype(np.int64))[None])
        if label == "share":
            tune = source.config.finetune
            wanted = (wanted * tune.scale + tune.center)[None]
        else:
            wanted = wanted.softmax(-1) if label == "states" else wanted.softmax(-1)[None]
        wanted = wanted[0, 1:-1] if label == "states" else wanted[0]
        assert record.length == length
        np.testing.assert_allclose(made, wanted.numpy(), rtol=1e-4, atol=1e-5)
    kept = {"states": 2 * 20_000 * 3 * 4}.get(label, 0)  # three classes of each residue, twice
    assert peaks[20_000] < 1.1 * peaks[5000] + kept


def test_what_evaluate_measures_is_what_predict_says(tuned, table, longseq):
    run = tuned("share", "head", steps=20)
    words = ("--split", "test", "--split", "valid", "--bootstrap", 20, "--json")
    printed = json.loads(longseq("evaluate", run.path, *words))
    (kept,) = run.evaluations_dir.glob("*.json")
    assert json.loads(kept.read_text()) == printed
    from longseq.label_data import labelled

    told = [each.value for each in api.predict(run.path, table)]
    rows = labelled(find(run.path).config, None).rows
    for split in ("test", "valid"):
        here = rows.of(split)
        truth = np.array([rows.labels[row][0] for row in here])
        found = printed["splits"][split]
        assert found["sequences"] == found["labels"] == len(here) > 3
        assert found["mse"] == pytest.approx(float(((truth - np.array(told)[here]) ** 2).mean()), rel=1e-4)
        assert found["pearson"] == pytest.approx(float(np.corrcoef(truth, np.array(told)[here])[0, 1]), rel=1e-4)
        assert found["intervals"]["mse"][0] <= found["mse"] <= found["intervals"]["mse"][1]
    shown = longseq("compare", run.path, tuned("share", "all").path)
    assert f"{printed['splits']['test']['spearman']:.4f}" in shown.partition("test, spearman")[2].splitlines()[0]


def test_another_table_is_evaluated_and_its_unknown_classes_refused(tuned, table, longseq, refused, folder):
    run = tuned("kind", "head").path
    lines = Path(table).read_text().splitlines()
    (folder / "new.csv").write_text("\n".join([*lines[:9], ""]))
    shown = json.loads(longseq("evaluate", run, "--data", "new.csv", "--json", "--bootstrap", 0))
    assert shown["splits"]["new.csv"]["labels"] == 8
    assert "intervals" not in shown["splits"]["new.csv"]
    assert "devices=2: one process is enough" in refused("evaluate", run, "--devices", "2")
    assert "sequences=5: of labels all rows are measured" in refused("evaluate", run, "--sequences", "5")
    assert "table.csv: no row is for ood" in refused("evaluate", run, "--split", "ood")
    (folder / "odd.csv").write_text("\n".join([lines[0], lines[1].replace("little", "some").replace("much", "some")]))
    sentence = refused("evaluate", run, "--data", "odd.csv")
    assert "odd.csv, row 1: kind is 'some', a class that the model has not learned; it knows little, much." in sentence


def test_predictions_are_refused_where_letters_are_unknown_or_columns_missing(tuned, table, refused, folder, trained):
    run = tuned("share", "head").path
    (folder / "bad.csv").write_text("sequence\nMKV\nMJV\n")
    assert "bad.csv, row 2, sequence: 'J' at position 2 is not one of" in refused("predict", run, "bad.csv")
    (folder / "bad.fasta").write_text(">a\nMKV\n>b\nM?V\n")
    assert "bad.fasta" in refused("predict", run, "bad.fasta", "--out", "out.csv")
    assert not (folder / "out.csv").exists()
    (folder / "other.csv").write_text("a,b\nMKV,1\n")
    assert "none is known to hold the sequences" in refused("predict", run, "other.csv")
    assert "has no column 'c'" in refused("predict", run, "other.csv", "--sequence", "c")
    assert "FASTA has no columns" in refused("predict", run, "bad.fasta", "--id", "x")
    before = Path(table).read_bytes()
    assert "table.csv: the file that is read, and results would replace it" in refused(
        "predict", run, table, "--out", table
    )
    assert Path(table).read_bytes() == before
    assert "predicts tokens; `longseq finetune` makes" in refused("predict", trained("plain"), table)


def test_what_is_no_number_is_refused_by_all_that_read_a_model(tuned, table, refused, folder):
    place = tuned("share", "head").checkpoints_dir
    weights = load_file(place / "step-00000002.ckpt/model.safetensors")
    for name in ("norm.weight", "norm.bias"):
        weights[name][3] = 3e38  # finite, and their sum is not
    facts = asdict(write(checkpoint.partial_path(place, 9) / "model.safetensors", save(weights)))
    broken = checkpoint.publish(place, position(9), {"model.safetensors": facts}).path
    calls = [("predict", table, "--out", "p.csv"), ("evaluate", "--data", table)]
    calls.append(("embed", "proteins.fasta", "--out", "v.npz"))
    for verb, *words in calls:
        assert "the model predicts what is no number (NaN or infinite)" in refused(verb, broken, *words)
    assert not (folder / "p.csv").exists()
    assert not (folder / "v.npz").exists()


def test_ids_are_those_of_the_column(tuned, longseq, folder):
    run = tuned("share", "head").path
    (folder / "named.tsv").write_text("name\tseq\tcode\nb\tMKV\t7\na\tWWW\t8\n")
    assert [row["id"] for row in rows_of(longseq("predict", run, "named.tsv", "--sequence", "seq"))] == ["b", "a"]
    assert [row["id"] for row in rows_of(longseq("predict", run, "named.tsv", "--id", "code"))] == ["7", "8"]


def test_other_verbs_refuse_a_model_of_labels_or_take_its_body(tuned, table, refused, base, folder):
    run = tuned("share", "lora").path
    (folder / "one.fasta").write_text(">a\nMKVLAAG\n")
    assert "predicts labels (regression) and no tokens" in refused("score", run, "one.fasta")
    assert "has learned labels already; give the model that it began with" in refused("finetune", run, table)
    assert "predicts labels (regression) and no tokens" in refused("sample", run)
    with pytest.raises(ConfigError, match=r"model\.init_from: .*: predicts labels \(regression\) and no tokens"):
        check_origin(load_config("small.yaml", ["data.train=proteins.fasta", f"model.init_from={run}"]))
    (found,) = api.embed(run, "one.fasta")
    assert found.residues.shape == (7, 32)
    (before,) = api.embed(base, "one.fasta")
    assert not np.allclose(found.residues, before.residues)


def test_a_run_whose_table_has_moved_predicts_and_says_which_key_names_it(tuned, table, longseq, refused, folder):
    run = tuned("kind", "head").path
    before = longseq("predict", run, table)
    moved = run.rename(folder / "else where")
    (folder / table).rename(folder / "a table.csv")
    assert longseq("predict", moved, "a table.csv") == before
    for verb in ("evaluate", "resume"):
        assert f"finetune.table: {folder / table} does not exist" in refused(verb, moved)
    shown = json.loads(longseq("evaluate", moved, "finetune.table=a table.csv", "--json", "--bootstrap", 0))
    assert shown["splits"]["test"]["labels"] > 3
    longseq("figures", moved)
    assert [path.name for path in (moved / "figures").iterdir()] == ["curves.png"]


def test_a_run_that_has_settled_or_whose_table_changed_is_not_resumed(tuned, table, refused):
    run = tuned("share", "head", "optim.lr=0", "trainer.valid_every=1", "finetune.patience=1", steps=9).path
    assert "its validation loss fell no more. To train on, wait longer" in refused("resume", run)
    assert "finetune.label=kind: the run" in refused("resume", run, "finetune.label=kind")
    Path(table).write_text(Path(table).read_text().replace("little", "none"))
    sentence = refused("resume", run, "finetune.patience=5")
    assert "table.csv (finetune.table) has changed since the run was started" in sentence
    assert "has changed" in refused("evaluate", run)


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        (["MKV,1.5"], [], "one labelled row cannot be both learned from and held out"),
        (["MKV,1.5", "MKL,nan"], [], "one labelled row cannot be both"),
        (["MKV,x", "MKL,x", "ML,x"], ["data.valid_fraction=0.5"], "the training rows have one class, 'x'"),
        *(
            ([f"MKV,{x}", f"MKL,{x}", f"ML,{x}"], ["data.valid_fraction=0.4"], f"rows have the same label, {x}:")
            for x in (1.5, 0.1)  # three times 0.1 has a deviation of 1e-17
        ),
        (["MKV,1e300", "MKL,-1e300", "ML,1.5"], ["data.valid_fraction=0.4"], "squares are too large or too small"),
        (["MKV,1.5", "MKL,2.5"], ["data.valid_fraction=0.0001", "data.test_fraction=0"], "no row is for valid"),
        (
            ["MKV,1", "MKL,2.5", "ML,3", "MW,4"],
            ["data.length=4", "data.valid_fraction=0.5"],
            "data.length=4: the longest",
        ),
        (["MKV,1.5", "MKL,2.5"], ["--label", "score"], "has no column 'score' for the labels"),
        (["MKV,1.5", "MKL,2.5"], ["--split-column", "label"], "label is '1.5'; write train, valid or test"),
        ([], [], "a table without rows"),
    ],
)
def test_a_table_that_teaches_nothing_is_refused_and_leaves_no_run(base, refused, folder, rows, words, sentence):
    (folder / "t.csv").write_text("\n".join(["sequence,label", *rows, ""]))
    assert sentence in refused("finetune", base.folder, "t.csv", "run.name=x", "trainer.accelerator=cpu", *words)
    assert not (folder / "runs/x").exists()


def test_names_of_all_seeds_are_free_before_the_first_is_trained(base, table, refused, folder):
    (folder / "runs/x-seed2").mkdir(parents=True)
    words = ("--label", "share", "--seeds", "3", "run.name=x", "trainer.accelerator=cpu")
    assert "x-seed2: a folder of this name exists" in refused("finetune", base.folder, table, *words)
    assert [path.name for path in (folder / "runs").iterdir()] == ["x-seed2"]


def test_a_table_is_not_learned_once_a_task_nor_as_a_branch(base, table, refused, folder, monkeypatch):
    words = ("finetune", base.folder, table, "--label", "share", "trainer.accelerator=cpu")
    assert "run.branch=x goes on from a run's checkpoint" in refused(*words, "run.branch=x")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "longseq finetune: task None of 2 that srun has started" in refused(*words)
    assert not (folder / "runs").exists()


def test_lora_without_peft_says_what_to_install(base, table, monkeypatch):
    from longseq.models.tuned import TunedModel
    from longseq.trained_model import learning_of

    config = configured(base, {"table": table, "label": "share", "learn": "lora", "task": "auto"}, [])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LongseqError, match=r"pip install 'longseq\[finetune\]'"):
        TunedModel(config.performer_spec(29), learning_of(config))


def test_defaults_fit_the_table_and_overrides_go_before(base, table):
    asked = {"table": table, "label": "share", "learn": "all", "task": "auto"}
    config = configured(base, asked, ["trainer.valid_every=7", "run.seed=5"], batch=8)
    longest = max(map(len, letters_of(table))) + 2
    assert (config.data.length, config.data.batch_tokens) == (longest, 8 * longest)
    assert (config.trainer.valid_every, config.trainer.checkpoint_every, config.trainer.keep_best) == (7, 7, 1)
    assert (config.finetune.sequence, config.finetune.task) == ("sequence", "regression")
    assert config.finetune.feature_seed == base.config.run.seed
    assert config.performer_spec(29).seed == base.config.run.seed != config.run.seed
    assert [configured(base, asked, [f"finetune.learn={each}"]).optim.lr for each in ("lora", "all")] == [1e-3, 3e-4]
    long = configured(base, asked, ["data.length=16384"], batch=8)
    assert long.trainer.accumulate == 2  # 65,536 tokens at a time


def test_classes_are_kept_as_the_table_has_them(base, folder):
    words = ["yes", "no", "1e3", "007", "true", "-", "~", "a; b", "[a]", "{b: c}", "#", "'x'"]
    (folder / "t.csv").write_text(
        "\n".join(["sequence,label", *(f"MKV{'ACDEFGHIKLMN'[i]},{w}" for i, w in enumerate(words))])
    )
    asked = {"table": "t.csv", "label": "label", "learn": "head", "task": "classification"}
    save_config(configured(base, asked, ["data.valid_fraction=0.3"]), folder / "config.yaml")
    assert load_config(folder / "config.yaml", resolved=True).finetune.classes == sorted(words)
    (folder / "t.csv").write_text("sequence,label\nMKV,${x}\nMKL,b\nML,c\n")
    with pytest.raises(ConfigError, match=r"finetune.classes=\$\{x\}: '\$\{' is a reference"):
        configured(base, asked, ["data.valid_fraction=0.5"])


def test_the_best_checkpoint_is_taken_unless_one_is_named(tuned, folder):
    run = tuned("share", "head", "optim.lr=0", "trainer.valid_every=1", "trainer.keep_checkpoints=9", steps=3)
    assert find(run.path).step == 1
    assert find(run.checkpoints_dir / "step-00000003.ckpt").step == 3
    shutil.rmtree(run.checkpoints_dir / "step-00000001.ckpt")
    assert find(run.path).step == 2
    for path in run.checkpoints_dir.glob("*.ckpt"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="none of its 2 checkpoints can be used"):
        find(run.path)


def test_measures_of_numbers_are_those_of_their_formulas():
    rng = np.random.default_rng(0)
    truth, told = rng.normal(size=(2, 50))
    found = of_numbers(truth, told)
    ranks = [values.argsort().argsort() for values in (truth, told)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, told)[0, 1])
    assert found["r2"] == pytest.approx(1 - ((truth - told) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert found["mse"] == pytest.approx(((truth - told) ** 2).mean())
    for constant in (1.0, 0.1):  # the mean of the latter is another number
        alike = np.full(3, constant)
        assert np.isnan([of_numbers(alike, told[:3])[name] for name in ("r2", "pearson", "spearman")]).all()
        assert np.isnan([of_numbers(truth[:3], alike)[name] for name in ("pearson", "spearman")]).all()


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_of_classes_are_those_of_their_formulas(classes):
    rng = np.random.default_rng(classes)
    truth = rng.integers(classes, size=80)
    told = rng.random((80, classes))
    told[np.arange(40), truth[:40]] += 0.5
    said, found = told.argmax(1), of_classes(truth, told)
    assert found["accuracy"] == pytest.approx((said == truth).mean())
    f1 = [2 * ((said == c) & (truth == c)).sum() / ((said == c).sum() + (truth == c).sum()) for c in range(classes)]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    one_hot = [np.eye(classes)[labels] - np.eye(classes)[labels].mean(0) for labels in (truth, said)]
    covariance = [[(a * b).sum() for b in one_hot] for a in one_hot]  # Gorodkin 2004
    assert found["mcc"] == pytest.approx(covariance[0][1] / np.sqrt(covariance[0][0] * covariance[1][1]))
    if classes == 2:
        pairs = told[truth == 1][:, 1][:, None] - told[truth == 0][:, 1]
        assert found["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    else:
        assert "auc" not in found


def test_intervals_resample_whole_sequences():
    """Of one sequence all right and one all wrong, a resampling has 0, a half or 1, however many residues there are."""
    labels = [np.zeros(500, dtype=np.int64), np.zeros(500, dtype=np.int64)]
    told = [np.tile([[0.9, 0.1]], (500, 1)), np.tile([[0.1, 0.9]], (500, 1))]
    found = summary(labels, told, 2, bootstrap=200, seed=0)
    assert (found["accuracy"], found["intervals"]["accuracy"]) == (0.5, [0.0, 1.0])
    assert (found["sequences"], found["labels"]) == (2, 1000)
    labels[0][10:] = IGNORE
    assert summary(labels, told, 2, bootstrap=0, seed=0)["labels"] == 510
    assert found["auc"] is None  # of one class
    json.dumps(found, allow_nan=False)


def test_the_spread_is_over_the_seeds():
    from longseq.evaluation.evaluate import Evaluation

    def evaluation(value: float) -> Evaluation:
        splits = {"test": {"spearman": value, "mse": None}}
        return Evaluation(Path("x"), "x", 1, "masked", "last", (), None, splits)

    found = Finetuning([], [evaluation(0.5), evaluation(0.7)]).spread("test")
    assert found == {"spearman": (pytest.approx(0.6), pytest.approx(0.02**0.5))}
