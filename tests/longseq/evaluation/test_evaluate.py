"""``longseq evaluate`` on small models: what it scores, how it is kept, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from Bio import SeqIO
from safetensors.torch import load_file, save_file

from command_line import curve
from longseq.cli import main
from longseq.commands import evaluate
from longseq.errors import RunError
from longseq.evaluation import result_files, tallies
from longseq.evaluation.evaluate import evaluations
from longseq.evaluation.request import Settings
from longseq.interop import exported
from longseq.models.performer import PerformerLM
from longseq.models.weights import save_weights
from longseq.output_files import output_file
from longseq.trained_model import find
from longseq_data.vocabulary import BOS, EOS, LETTERS


def test_a_run_of_slices_is_evaluated_as_whole_sequences_in_tiles(trained):
    """A slice of 16,384 tokens needs none."""
    run = trained(
        "sliced", "data.length=32768", "data.batch_tokens=32768", "trainer.devices=2", "trainer.context_parallel=2"
    )
    assert find(run).spec.tile == 4096


def test_scores_are_those_of_each_record_by_itself(trained, longseq, folder):
    """Loss, accuracy, top-3 and the calibration, from a plain loop over Biopython's records."""
    run = trained()
    report = json.loads(longseq("evaluate", run, "--json", "--top-k", 3, "--bootstrap", 0))
    source = find(run)
    model, losses, right, near, sure, wanted = source.load(), [], [], [], [], []
    for record in SeqIO.parse(folder / "test.fasta", "fasta"):
        ids = [BOS, *(LETTERS.index(letter) for letter in record.seq), EOS]
        for start in range(0, len(ids) - 1, 64):  # windows of data.length
            row = torch.tensor(ids[start : start + 65])
            with torch.no_grad():
                logits = model(row[None, :-1])[0]
            ranks = logits.argsort(-1, descending=True)
            losses += torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").tolist()
            right += (ranks[:, 0] == row[1:]).tolist()
            near += (ranks[:, :3] == row[1:, None]).any(-1).tolist()
            sure += logits.softmax(-1).amax(-1).tolist()
            wanted += row[1:].tolist()
    scores = report["splits"]["test"]
    assert scores["targets"] == len(losses)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores["bits"] == pytest.approx(np.mean(losses) / math.log(2), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert scores["top_3_accuracy"] == pytest.approx(np.mean(near))
    bins = np.minimum((np.array(sure) * 15).astype(int), 14)
    gaps = [abs(np.sum(np.array(right)[bins == b]) - np.sum(np.array(sure)[bins == b])) for b in set(bins.tolist())]
    assert scores["ece"] == pytest.approx(sum(gaps) / len(sure), abs=1e-5)
    assert scores["by_token"]["M"]["targets"] == wanted.count(LETTERS.index("M"))
    assert sum(row["targets"] for row in scores["by_length"]) == len(losses)


def test_several_checkpoints_make_one_table_and_curves_over_the_steps(trained, longseq):
    run = trained("one", steps=(10, 20, 30))
    other = trained("two", steps=(5,))
    table = longseq("evaluate", run, other, "--bootstrap", 0)
    rows = [line.split() for line in table.splitlines() if " test " in line]
    assert [row[:3] for row in rows] == [["one", "step", "30"], ["two", "step", "5"]]
    reports = json.loads(longseq("evaluate", run, "--all-checkpoints", "--json"))
    assert [report["step"] for report in reports] == [10, 20, 30]
    losses = {report["step"]: report["splits"]["test"]["loss"] for report in reports}
    shown = curve_of(run / "tensorboard" / "evaluation", "test/loss")
    assert shown == pytest.approx(losses, rel=1e-6)
    assert len(list((run / "evaluations").glob("step-*-test.json"))) == 3


def test_a_file_is_scored_without_the_training_data(trained, longseq, folder):
    run = trained()
    (folder / "proteins.fasta").unlink()
    whole = json.loads(longseq("evaluate", run, "--data", "test.fasta", "--json"))["splits"]["test.fasta"]
    assert whole["sequences"] == 39  # 30 records, nine of them longer than a window
    assert whole["baseline"] is None


def test_results_are_printed_where_they_cannot_be_kept(trained, capsys, monkeypatch):
    run = trained()

    def full(report: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(result_files, "keep_json", full)
    assert main(["evaluate", str(run)]) == 1
    shown = capsys.readouterr()
    assert any(line.startswith("test") for line in shown.out.splitlines())
    assert "No space left on device" in shown.err
    assert "could not be kept" in shown.err


def test_points_of_an_evaluation_take_the_place_of_earlier_ones(tmp_path):
    for step, value in ((10, 3.0), (20, 2.0), (10, 2.5)):
        result_files.add_points(tmp_path / "evaluation", {"test/loss": value}, step)
    assert curve_of(tmp_path / "evaluation", "test/loss") == {10: 2.5, 20: 2.0}
    assert len(list((tmp_path / "evaluation").glob("*tfevents*"))) == 1


def test_what_a_killed_evaluation_left_is_no_run_in_tensorboard(tmp_path):
    folder = tmp_path / "evaluation"
    result_files.add_points(folder, {"test/loss": 3.0}, 10)
    shutil.copytree(folder, folder / ".partial-0123abcd")
    result_files.add_points(folder, {"test/loss": 2.0}, 20)
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    assert curve_of(folder, "test/loss") == {10: 3.0, 20: 2.0}


def test_evaluations_at_the_same_time_lose_no_points(tmp_path):
    writers = [
        Thread(target=result_files.add_points, args=(tmp_path / "evaluation", {"test/loss": float(step)}, step))
        for step in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert curve_of(tmp_path / "evaluation", "test/loss") == {step: float(step) for step in range(8)}


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    result_files.keep_json({"a": 1}, tmp_path / "kept.json")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        result_files.keep_json({"a": 2}, tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_a_full_disk_is_said_with_the_file_that_did_not_fit(tmp_path):
    for writing in (output_file, exported.writing):
        with pytest.raises(OSError, match="No space") as raised, writing(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert raised.value.filename == str(tmp_path / "out")
    with pytest.raises(RunError, match="weights: cannot be written"):
        save_weights({"a": torch.zeros(2)}, tmp_path / "nowhere" / "weights")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_refused(trained, refused, folder):
    assert "no such run folder" in refused("evaluate", folder / "nowhere")
    assert "not a run folder" in refused("evaluate", folder)
    assert "a file" in refused("evaluate", folder / "test.fasta")
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "mp_rank_00_model_states.pt").touch()
    assert "DeepSpeed's own" in refused("evaluate", folder / "global_step5")


def test_an_exported_folder_has_no_splits(trained, longseq, refused):
    longseq("export", trained(), "out")
    for words in (["--split", "test", "--data", "test.fasta"], ["--split", "test"], []):
        assert "knows no splits" in refused("evaluate", "out", *words)
    assert "has one model" in refused("evaluate", "out", "--all-checkpoints", "--data", "test.fasta")


@pytest.mark.parametrize("damage", ["cut", "longer", "nan", "no embedding"])
def test_damaged_weights_are_refused_by_every_verb(trained, longseq, refused, damage):
    """A folder without checksums, as it is copied from one machine to another."""
    sentences = {"nan": "blocks.1.mlp.0.weight holds NaN", "no embedding": "holds no embedding"}
    longseq("export", trained(), "out")
    weights = Path("out/model.safetensors")
    content = weights.read_bytes()
    if damage == "nan":
        tensors = load_file(weights)
        tensors["model.blocks.1.mlp.0.weight"][3, 5] = math.nan
        save_file(tensors, weights)
    else:
        names = content.replace(b'"model.embedding.weight"', b'"model.embeddinG.weight"')
        weights.write_bytes({"cut": content[:-7], "longer": content + b"more", "no embedding": names}[damage])
    for words in (["evaluate", "out", "--data", "test.fasta"], ["score", "out", "test.fasta"], ["sample", "out"]):
        said = refused(*words)
        assert "model.safetensors: " in said
        assert sentences.get(damage, "damaged") in said


def test_predictions_that_are_no_numbers_are_refused(trained, refused, monkeypatch):
    run = trained()
    hidden = PerformerLM.hidden
    monkeypatch.setattr(PerformerLM, "hidden", lambda self, *inputs: hidden(self, *inputs) * math.nan)
    for words in (["evaluate", run], ["score", run, "test.fasta"]):
        assert "predicts what is no number" in refused(*words)


def test_a_damaged_checkpoint_among_all_is_named_once(trained, capsys):
    run = trained(steps=(10, 20))
    with (run / "checkpoints" / "step-00000020.ckpt" / "model.safetensors").open("r+b") as file:
        file.write(b"damage")
    assert main(["evaluate", str(run), "--all-checkpoints"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("longseq: warning:") == 1
    assert "left out" in shown.err
    assert "step 10" in shown.out
    assert "step 20" not in shown.out


def test_a_log_has_a_line_now_and_then(trained, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "_SILENCE", -1.0)
    assert main(["evaluate", str(trained()), "--data", "proteins.fasta"]) == 0
    assert "scoring proteins.fasta, step 20: 40 sequences" in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(evaluate, "_SILENCE", 30.0)
    assert main(["evaluate", str(trained("two")), "--sequences", "3"]) == 0
    assert "scoring" not in capsys.readouterr().err


def test_progress_counts_the_sequences_of_each_checkpoint_and_part(trained, monkeypatch):
    run, seen = trained("one", steps=(10, 20)), []
    monkeypatch.setattr(tallies, "batch_sequences", lambda config: 8)
    settings = Settings(splits=("test", "valid"), all_checkpoints=True, bootstrap=0)
    list(evaluations([run], settings, lambda what, sequences: seen.append((what, sequences))))
    of_test = [sequences for what, sequences in seen if what == "scoring test, step 10"]
    assert of_test == [0, 8, 16, 24, 32, 39]  # 30 records, 9 of them in two windows
    assert list(dict.fromkeys(what for what, _ in seen)) == [
        f"scoring {part}, step {step}" for step in (10, 20) for part in ("test", "valid")
    ]


def test_data_that_several_models_share_are_said_once(trained, capsys):
    one, other = trained("one"), trained("other", "model.objective=masked")
    assert main(["evaluate", str(one), str(other), "--sequences", "3"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["data.train", "data.test"]
    third = trained("third", "data.test=proteins.fasta")
    assert main(["evaluate", str(one), str(third), "--sequences", "3"]) == 0
    assert capsys.readouterr().err.count("data.test:") == 2
    assert main(["evaluate", str(one), str(third), "--data", "test.fasta", "--sequences", "3"]) == 0
    assert capsys.readouterr().err.count("records") == 1


def test_models_and_keys_may_stand_behind_options(trained, longseq):
    one, other = trained("one"), trained("other")
    found = json.loads(longseq("evaluate", one, "--json", other, "--sequences", "3", "data.ood=proteins.fasta"))
    assert [report["name"] for report in found] == ["one", "other"]
    assert list(found[0]["splits"]) == ["test", "ood"]


def test_a_checkpoint_of_an_older_format_is_refused(trained, refused):
    manifest = trained() / "checkpoints" / "step-00000020.ckpt" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    for target in (manifest.parent, manifest.parent.parent.parent):
        sentence = refused("evaluate", target)
        assert "format 1, this version of longseq reads 2" in sentence


def test_data_of_other_tokens_are_refused(trained, refused, folder):
    run = trained()
    (folder / "book.txt").write_text("It was a bright cold day in April.\n")
    assert "data.format=text cannot be read as data.tokenizer=protein" in refused("evaluate", run, "--data", "book.txt")
    assert "a model of 29 tokens" in refused("sample", run, "data.tokenizer=bytes", "data.format=text")


def curve_of(folder: Path, tag: str) -> dict[int, float]:
    """As command_line.curve, of another folder."""
    link = folder.parent / "link"
    link.mkdir(exist_ok=True)
    target = link / "tensorboard"
    target.unlink(missing_ok=True)
    target.symlink_to(folder)
    return curve(link, tag)
