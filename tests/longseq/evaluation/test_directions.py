"""Log-likelihoods of both directions: means of two plain passes over the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import longseq as api
from longseq.cli import main
from longseq.errors import LongseqError
from longseq.evaluation.field.measures import spearman
from longseq.trained_model import find
from longseq_data.vocabulary import BOS, EOS, LETTERS

WILD = "MKVLAACDEFGHIKLMNPQRSTVWY"
MUTANTS = ["M1A", "K2W", "V3A:A6G", "Y25A", "D8E", "G11P:H12P:I13P"]
BOTH = ("one", "model.objective=causal", "data.reverse=0.5")


def one_way(model, sequence: str) -> float:
    tokens = torch.tensor([[BOS, *map(LETTERS.index, sequence), EOS]])
    with torch.no_grad():
        found = model(tokens[:, :-1])[0].double().log_softmax(-1)
    return float(found.gather(1, tokens[0, 1:, None]).sum())


def mean(model, sequence: str) -> float:
    return (one_way(model, sequence) + one_way(model, sequence[::-1])) / 2


def changed(mutant: str) -> str:
    letters = list(WILD)
    for word in mutant.split(":"):
        letters[int(word[1:-1]) - 1] = word[-1]
    return "".join(letters)


@pytest.fixture
def files(folder):
    (folder / "wild.fasta").write_text(f">w\n{WILD}\n")
    (folder / "few.fasta").write_text(f">w\n{WILD}\n>s\nMKV\n>l\n{WILD * 3}\n")
    rows = [f"{mutant},{score}" for score, mutant in enumerate(MUTANTS)]
    (folder / "scan.csv").write_text("\n".join(["mutant,DMS_score", *rows]))
    (folder / "gym").mkdir()
    (folder / "gym/a.csv").write_text((folder / "scan.csv").read_text())
    indels = [WILD[1:], WILD + "A", WILD[:9] + WILD[12:], WILD[:4] + "GG" + WILD[4:]]
    rows = [f"{indel},{score}" for score, indel in enumerate(indels)]
    (folder / "gym/b.csv").write_text("\n".join(["mutated_sequence,DMS_score", *rows]))
    head = "DMS_id,DMS_filename,target_seq,UniProt_ID,coarse_selection_type"
    (folder / "gym/reference.csv").write_text(f"{head}\nA,a.csv,{WILD},P,Activity\nB,b.csv,{WILD},P,Activity\n")
    return indels


def test_a_model_of_both_directions_is_scored_in_both(trained, files):
    run = trained(*BOTH)
    model = find(run).load("cpu")
    sequences = [WILD, "MKV", WILD * 3]
    found = [each.log_likelihood for each in api.score(run, "few.fasta")]
    assert found == pytest.approx([mean(model, each) for each in sequences], abs=1e-3)
    forward = [each.log_likelihood for each in api.score(run, "few.fasta", direction="forward")]
    assert forward == pytest.approx([one_way(model, each) for each in sequences], abs=1e-3)
    assert abs(found[0] - forward[0]) > 0.1
    effects = [each.effect for each in api.variant_effects(run, "wild.fasta", table="scan.csv")]
    expected = [mean(model, changed(each)) - mean(model, WILD) for each in MUTANTS]
    assert effects == pytest.approx(expected, abs=1e-3)


def test_proteingym_takes_the_mean_of_both_directions_and_keeps_each_by_itself(trained, files):
    run = trained(*BOTH)
    model = find(run).load("cpu")
    found = api.benchmark_proteingym("gym", run).models[0]
    expected = {
        "substitutions": [mean(model, changed(each)) - mean(model, WILD) for each in MUTANTS],
        "indels": [mean(model, each) - mean(model, WILD) for each in files],
    }
    told = []
    again = api.benchmark_proteingym("gym", run, direction="forward", progress=lambda *what: told.append(what[3]))
    assert told == [False, False]
    for result, other in zip(found.assays, again.models[0].assays, strict=True):
        scores = np.array(expected[result.kind])
        assert result.measures["Spearman"] == pytest.approx(spearman(np.arange(len(scores)), scores))
        lines = [line.split(",")[-1] for line in other.scores.read_text().splitlines()[1:]]
        assert np.abs(np.array(lines, dtype=float) - scores).max() > 0.01
    api.benchmark_proteingym("gym", run, direction="forward", progress=lambda *what: told.append(what[3]))
    assert told == [False, False, True, True]


def test_other_models_are_read_forward_unless_both_is_asked_for(trained, files, capsys):
    run = trained("one", "model.objective=causal")
    model = find(run).load("cpu")
    for asked, expected in (((), one_way), (("--direction", "both"), mean)):
        assert main(["score", str(run), "wild.fasta", "--json", *asked]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["log_likelihood"] == pytest.approx(expected(model, WILD), abs=1e-3)
    with pytest.raises(LongseqError, match="direction=backward: take forward or both"):
        api.score(run, "wild.fasta", direction="backward")
    with pytest.raises(LongseqError, match="read behind a context is read forward"):
        api.score(run, "wild.fasta", direction="both", context="few.fasta")


def test_samples_of_both_directions_are_said_to_be(trained, folder, capsys):
    said = (
        "longseq: trained on both directions (data.reverse=0.5): about that share of the sequences runs from the last"
    )
    for name, *keys in (BOTH, ("plain", "model.objective=causal")):
        run = trained(name, *keys)
        capsys.readouterr()
        assert main(["sample", str(run), "--length", "3"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(">sample-0 ")
        assert (said in err) == (name == "one")
        api.export(run, folder / f"out-{name}")
        card = (folder / f"out-{name}/README.md").read_text()
        assert ("- both directions: a share of 0.5 from the last residue to the first" in card) == (name == "one")


def test_an_exported_model_knows_its_directions_and_a_masked_one_has_none(trained, files, folder):
    run = trained(*BOTH)
    api.export(run, folder / "out")
    ours, theirs = ([each.log_likelihood for each in api.score(each, "few.fasta")] for each in (run, folder / "out"))
    assert ours == theirs
    masked = trained("masked", "model.objective=masked")
    with pytest.raises(LongseqError, match=r"a masked model .*leave direction out"):
        api.variant_effects(masked, "wild.fasta", MUTANTS, direction="both")
