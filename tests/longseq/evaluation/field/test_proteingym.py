"""``longseq benchmark proteingym`` on a small folder of the same make, against plain loops over the model."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import longseq as api
from longseq.errors import LongseqError
from longseq.evaluation import shards
from longseq.evaluation.field import fitness
from longseq.evaluation.field.measures import above_median, measures
from longseq.evaluation.work import work_of
from longseq.trained_model import find
from longseq_data.vocabulary import BOS, EOS, LETTERS, MASK


class Here(shards.Workers):
    """Processes that are none: each does its share at once."""

    def __enter__(self):
        for rank in range(self.world):
            shards.take_part(self.place, rank, self.world, work_of(shards.Job.read(self.place)))
        return self

    def lost(self, done=None):
        return {}


WILD = "MKVLAACDEFGHIKLMNPQRSTVWY"
LONG = "MKVLAACDEFGHIKLMNPQRSTVWY" * 42  # 1,050 residues
AMINO_ACIDS = LETTERS[:20]


def ids(sequence):
    return [BOS, *(LETTERS.index(letter) for letter in sequence), EOS]


def log_p(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0].double().log_softmax(-1)


def likelihood(model, sequence):
    tokens = ids(sequence)
    return sum(float(row[token]) for row, token in zip(log_p(model, tokens[:-1]), tokens[1:], strict=True))


def pseudo(model, sequence):
    tokens = ids(sequence)
    total = 0.0
    for at in range(1, len(sequence) + 1):
        total += float(log_p(model, [*tokens[:at], MASK, *tokens[at + 1 :]])[at, tokens[at]])
    return total


def marginal(model, sequence, changes):
    tokens = ids(sequence)
    for at, _ in changes:
        tokens[at] = MASK
    found = log_p(model, tokens)
    return sum(float(found[at, LETTERS.index(new)] - found[at, ids(sequence)[at]]) for at, new in changes)


def changed(sequence, changes):
    letters = list(sequence)
    for at, new in changes:
        letters[at - 1] = new
    return "".join(letters)


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def gym(folder):
    """Two assays of substitutions, one of them of a long protein, and one of indels, as ProteinGym unpacks."""
    rng = np.random.default_rng(0)
    place = folder / "gym"

    def mutants(target, number):
        found = []
        for index in range(number):
            sites = sorted(rng.choice(len(target), 1 + index % 3, replace=False) + 1)
            found.append([(int(at), AMINO_ACIDS[(LETTERS.index(target[at - 1]) + 1 + index) % 20]) for at in sites])
        return found

    made = {}
    for name, target, number in (("SHORT_2020", WILD, 40), ("LONG_2021", LONG, 12)):
        made[name] = (target, mutants(target, number))
        score = rng.normal(size=number)
        rows = [
            (":".join(f"{target[at - 1]}{at}{new}" for at, new in each), changed(target, each), value, int(value > 0.3))
            for each, value in zip(made[name][1], score, strict=True)
        ]
        header = ("mutant", "mutated_sequence", "DMS_score", "DMS_score_bin")
        write(place / "DMS_ProteinGym_substitutions" / f"{name}.csv", header, rows)
    indels = [WILD[:5] + WILD[7:], WILD[:9] + "GG" + WILD[9:], WILD[1:], WILD + "A", WILD[:12] + WILD[15:]]
    write(
        place / "DMS_ProteinGym_indels/SHORT_2020.csv",
        ("mutated_sequence", "DMS_score"),
        list(zip(indels, [1, 4, 2, 3, 0], strict=True)),
    )
    header = ("DMS_id", "DMS_filename", "UniProt_ID", "taxon", "target_seq", "coarse_selection_type")
    rows = [
        ("SHORT_2020", "SHORT_2020.csv", "SHORT", "Human", WILD, "Activity"),
        ("LONG_2021", "LONG_2021.csv", "LONG", "Virus", LONG, "Binding"),
        ("ELSEWHERE_2022", "ELSEWHERE_2022.csv", "ELSE", "Virus", WILD, "Binding"),
    ]
    write(place / "DMS_substitutions.csv", (*header, "MSA_Neff_L_category"), [(*row, "medium") for row in rows])
    row = ("SHORT_2020", "SHORT_2020.csv", "SHORT", "Human", WILD, "Stability", 2.5)
    write(place / "reference_files/DMS_indels.csv", (*header, "DMS_binarization_cutoff"), [row])
    return place, made, indels


def by_assay(result):
    return {(each.assay.id, each.kind): each for each in result.models[0].assays}


def scores(result):
    with result.scores.open(newline="") as file:
        return np.array([float(row["score"]) for row in csv.DictReader(file)])


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_scores_are_marginals_or_likelihoods_and_their_measures_the_fields(trained, gym, objective):
    """Of substitutions and of indels; a protein of 1,050 residues is read whole."""
    place, made, indels = gym
    run = trained("one", f"model.objective={objective}")
    found = api.benchmark_proteingym(place, run)
    model = find(run).load()
    results = by_assay(found)
    assert sorted(results) == [
        ("LONG_2021", "substitutions"),
        ("SHORT_2020", "indels"),
        ("SHORT_2020", "substitutions"),
    ]
    assert found.absent == ["ELSEWHERE_2022"]
    for name, (target, mutants) in made.items():
        result = results[name, "substitutions"]
        if objective == "masked":
            expected = np.array([marginal(model, target, each) for each in mutants])
        else:
            wild = likelihood(model, target)
            expected = np.array([likelihood(model, changed(target, each)) - wild for each in mutants])
        assert scores(result) == pytest.approx(expected, abs=2e-3)
        with (place / f"DMS_ProteinGym_substitutions/{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        measured = np.array([float(row["DMS_score"]) for row in rows])
        fit = np.array([row["DMS_score_bin"] == "1" for row in rows])
        own = scores(result)
        assert result.measures == pytest.approx(measures(measured, own, fit, above_median(own)), nan_ok=True)
        assert list(result.by_depth) == ["1", "2", "3"]
    whole = pseudo if objective == "masked" else likelihood
    result = results["SHORT_2020", "indels"]
    expected = np.array([whole(model, each) - whole(model, WILD) for each in indels])
    assert scores(result) == pytest.approx(expected, abs=2e-3)
    fit = np.array([False, True, False, True, False])  # DMS_score of at least 2.5
    own = scores(result)
    assert result.measures == pytest.approx(
        measures(np.array([1.0, 4, 2, 3, 0]), own, fit, above_median(own)), nan_ok=True
    )
    short, long = (results[name, "substitutions"].measures["Spearman"] for name in ("SHORT_2020", "LONG_2021"))
    averages = found.models[0].averages("substitutions")
    assert averages.average == pytest.approx((short + long) / 2)
    assert averages.groups["length"] == pytest.approx({"up to 1,022 residues": short, "longer than 1,022": long})
    assert averages.groups["MSA depth"] == pytest.approx({"Medium": (short + long) / 2})


def test_variants_of_the_same_sites_share_a_pass(trained, gym, monkeypatch):
    """All 19 mutants of two sites, and of both together: three passes."""
    from longseq.models.performer import PerformerLM

    place, _, _ = gym
    run = trained("masked", "model.objective=masked")
    singles = [f"{WILD[at - 1]}{at}{new}" for at in (3, 7) for new in AMINO_ACIDS if new != WILD[at - 1]]
    (place.parent / "wild.fasta").write_text(f">w\n{WILD}\n")
    rows, read = [], PerformerLM.hidden

    def counted(self, tokens, *rest):
        rows.append(len(tokens))
        return read(self, tokens, *rest)

    monkeypatch.setattr(PerformerLM, "hidden", counted)
    found = list(api.variant_effects(run, place.parent / "wild.fasta", [*singles, "C7A:V3G", "V3A:C7G"]))
    assert sum(rows) == 3
    monkeypatch.undo()
    model = find(run).load()
    assert found[0].effect == pytest.approx(marginal(model, WILD, [(3, singles[0][-1])]), abs=1e-4)
    assert found[-2].effect == pytest.approx(marginal(model, WILD, [(3, "G"), (7, "A")]), abs=1e-4)
    assert found[-1].effect == pytest.approx(marginal(model, WILD, [(3, "A"), (7, "G")]), abs=1e-4)


def test_an_assay_that_is_done_is_not_done_again(trained, gym):
    """Stopped before the second, it goes on there; other weights or mutants are scored anew."""
    place, _, _ = gym
    run = trained("one", steps=(20,))
    seen = []

    def stops(model, assay, kind, before):
        seen.append((assay, kind, before))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.benchmark_proteingym(place, run, progress=stops)
    assert seen == [("SHORT_2020", "substitutions", False), ("LONG_2021", "substitutions", False)]
    seen.clear()
    first = api.benchmark_proteingym(place, run, progress=lambda *what: seen.append(what[1:]))
    assert [before for *_, before in seen] == [True, False, False]
    seen.clear()
    again = api.benchmark_proteingym(place, run, progress=lambda *what: seen.append(what[1:]))
    assert [before for *_, before in seen] == [True, True, True]
    assert json.dumps(again.as_dict()) == json.dumps(first.as_dict())
    path = place / "DMS_ProteinGym_indels/SHORT_2020.csv"
    path.write_text(path.read_text().replace(",4", ",5"))
    seen.clear()
    api.benchmark_proteingym(
        place, run, ["trainer.accelerator=cpu"], assays=["SHORT_2020"], progress=lambda *w: seen.append(w[3])
    )
    assert seen == [False, False]  # other options; and other mutants


def test_a_kill_in_the_middle_loses_no_assay_that_was_done(trained, gym, folder):
    """The process is killed while it computes the long one."""
    place, _, _ = gym
    run = trained("masked", "model.objective=masked")
    header = ("mutant", "DMS_score")
    many = [(f"{LONG[at]}{at + 1}{'A' if LONG[at] != 'A' else 'G'}", at) for at in range(1000)]
    write(place / "DMS_ProteinGym_substitutions/LONG_2021.csv", header, many)
    words = [sys.executable, "-m", "longseq.cli", "benchmark", "proteingym", str(place), str(run)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "LONG_2021" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = run / "evaluations/proteingym"
    assert [path.name for path in sorted(kept.rglob("*.json"))] == ["SHORT_2020.json"]
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("SHORT_2020.*")}
    seen = []
    api.benchmark_proteingym(place, run, assays=["SHORT_2020"], progress=lambda *what: seen.append(what[2:]))
    assert seen == [("substitutions", True), ("indels", False)]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_processes_share_the_assays(trained, gym, monkeypatch):
    place, _, _ = gym
    runs = [trained(name, f"model.objective={name}") for name in ("causal", "masked")]
    wanted = api.benchmark_proteingym(place, runs, out="alone").as_dict()
    told, computed = [], []
    own = fitness.fitness
    monkeypatch.setattr(fitness, "fitness", lambda *what: computed.append(what[2].assay.id) or own(*what))
    monkeypatch.setattr(shards, "Workers", Here)
    found = api.benchmark_proteingym(place, runs, out="shared", devices=2, progress=lambda *what: told.append(what))
    assert len(computed) == len(told) == 6
    assert [what[0] for what in told] == ["causal"] * 3 + ["masked"] * 3
    assert not any(before for _, _, _, before in told)
    assert json.dumps(found.as_dict()).replace("shared/", "alone/") == json.dumps(wanted)


def test_published_models_stand_beside_over_the_same_assays(trained, gym, longseq):
    place, _, _ = gym
    run = trained()
    header = ("DMS ID", "ESM2 (8M)", "Other", "Selection Type", "UniProt ID", "MSA_Neff_L_category", "Taxon")
    rows = [
        ("SHORT_2020", 0.2, 0.5, "Activity", "SHORT", "Medium", "Human"),
        ("LONG_2021", 0.4, 0.1, "Binding", "LONG", "Medium", "Virus"),
        ("ELSEWHERE_2022", 0.9, 0.9, "Binding", "ELSE", "Medium", "Virus"),
    ]
    write(place / "DMS_substitutions_Spearman_DMS_level.csv", header, rows)
    found = api.benchmark_proteingym(place, run)
    assert found.compared("substitutions")["ESM2 (8M), published"]["Spearman"].average == pytest.approx(0.3)
    assert "Other, published" not in found.compared("substitutions")
    other = api.benchmark_proteingym(place, run, beside=["Other"]).compared("substitutions")["Other, published"][
        "Spearman"
    ]
    assert other.groups["length"] == pytest.approx({"up to 1,022 residues": 0.5, "longer than 1,022": 0.1})
    with pytest.raises(LongseqError, match=r"beside=Third: no such model .*; those here have ESM2 \(8M\), Other"):
        api.benchmark_proteingym(place, run, beside=["Third"])
    shown = longseq("benchmark", "proteingym", place, run, "--beside", "Other", "--assay", "SHORT_2020")
    (line,) = [line for line in shown.splitlines() if line.startswith("Other, published  ")][:1]
    assert line.split()[2:] == ["0.500", "–", "–", "–", "–", "1"]
    assert "substitutions: 1 assays of 1 proteins" in shown
    assert "indels: 1 assays of 1 proteins" in shown


def test_the_letters_alone_are_the_baseline(trained, gym):
    place, made, _ = gym
    found = api.benchmark_proteingym(place, trained(), assays=["SHORT_2020"])
    result = by_assay(found)["SHORT_2020", "substitutions"]
    from Bio.Align import substitution_matrices

    blosum = substitution_matrices.load("BLOSUM62")
    with (place / "DMS_ProteinGym_substitutions/SHORT_2020.csv").open(newline="") as file:
        measured = np.array([float(row["DMS_score"]) for row in csv.DictReader(file)])
    target, mutants = made["SHORT_2020"]
    own = np.array([sum(blosum[target[at - 1]][new] for at, new in each) for each in mutants])
    expected = measures(measured, own, measured > 0.3, above_median(own))
    assert result.baselines["BLOSUM62"] == pytest.approx(expected)
    assert set(result.baselines) == {"BLOSUM62", "residue frequencies"}
    assert by_assay(found)["SHORT_2020", "indels"].baselines == {}


def test_json_is_what_the_function_returns_and_has_no_nan(trained, gym, longseq):
    place, _, _ = gym
    run = trained()
    printed = json.loads(longseq("benchmark", "proteingym", place, run, "--json"), parse_constant=pytest.fail)
    assert printed == api.benchmark_proteingym(place, run).as_dict()
    assert printed["averages"]["indels"]["one"]["Spearman"]["assays"] == 1


def test_two_checkpoints_of_a_run_keep_their_assays_apart(trained, gym, folder):
    place, _, _ = gym
    run = trained("one", steps=(10, 20))
    both = sorted((run / "checkpoints").glob("step-*.ckpt"))
    found = api.benchmark_proteingym(place, both, assays=["SHORT_2020"], out=folder / "kept")
    assert [model.name for model in found.models] == ["one step 10", "one step 20"]
    first, second = (model.assays[0].scores for model in found.models)
    assert first != second
    assert first.read_text() != second.read_text()
    assert first.is_relative_to(folder / "kept")
    (folder / "copy").mkdir()
    copy = shutil.copytree(run, folder / "copy/one")
    alike = api.benchmark_proteingym(place, [run, copy], assays=["SHORT_2020"])
    assert [model.name for model in alike.models] == [str(each / "checkpoints" / both[1].name) for each in (run, copy)]
    with pytest.raises(LongseqError, match=r"would be kept in one folder, kept/one-step-0*20"):
        api.benchmark_proteingym(place, [run, copy], assays=["SHORT_2020"], out="kept")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda place: (place / "of_one.csv").write_text("DMS_id,DMS_filename,target_seq\nLONG_2021,x,\n"),
         "none of the 1 assays of of_one.csv is here"),
        (lambda place: (place / "of_one.csv").write_text("DMS_id,DMS_filename,target_seq\nLONG_2021,,\n"),
         "none of the 1 assays of of_one.csv is here"),
        (lambda place: edit(place, "C7", "W7"), "position 7 of LONG_2021 is C, not W"),
        (lambda place: edit(place, ",0\n", ",zero\n"), "line 2: DMS_score_bin is 'zero', which is no number"),
        (lambda place: edit(place, ",0\n", "\n"), "line 2: 3 fields, but the header has 4"),
        (lambda place: edit(place, "DMS_score,", "score,"), "it needs the columns DMS_score"),
        (lambda place: edit(place, ",0.5,", ",1_0,"), "line 2: DMS_score is '1_0', which is no number"),
        (lambda place: edit(place, "_score_bin", "_score"), "two columns are called DMS_score; remove one of them"),
        (lambda place: (place / "DMS_ProteinGym_substitutions/LONG_2021.csv").write_text(
            "mutant,DMS_score\np.Cys7Ala,1\n"), "line 2: 'p.Cys7Ala' is no change of a residue"),
        (lambda place: edit(place, "\nC7A,", f"\nWT,{LONG},0,1\nC7A,"), "line 2: 'WT' is no change of a residue"),
        (lambda place: (place / "DMS_ProteinGym_substitutions/LONG_2021.csv").write_text(
            f"mutated_sequence,DMS_score\n{LONG},1\n ,2\n"), "line 3: mutated_sequence is empty"),
        (lambda place: refer(place, "LONG_2021", "LONG_2021"), "line 3: a second assay is called LONG_2021"),
        (lambda place: refer(place, "../LONG_2021"), "DMS_id '../LONG_2021' can be no file's name"),
    ],
)  # fmt: skip
def test_what_is_no_assay_is_refused_by_its_place(trained, gym, refused, damage, sentence):
    place, _, _ = gym
    path = place / "DMS_ProteinGym_substitutions/LONG_2021.csv"
    path.write_text(f"mutant,mutated_sequence,DMS_score,DMS_score_bin\nC7A,{changed(LONG, [(7, 'A')])},0.5,0\n")
    refer(place, "LONG_2021")
    damage(place)
    assert sentence in refused("benchmark", "proteingym", place, trained(), "--reference", place / "of_one.csv")


def refer(place, *names):
    lines = [f"{name},LONG_2021.csv,{LONG}\n" for name in names]
    (place / "of_one.csv").write_text("DMS_id,DMS_filename,target_seq\n" + "".join(lines))


def edit(place, old, new):
    path = place / "DMS_ProteinGym_substitutions/LONG_2021.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_arguments_that_cannot_work_are_refused(trained, gym, refused, folder):
    place, _, _ = gym
    run = trained()
    assert "has no assay 'LONG'" in refused("benchmark", "proteingym", place, run, "--assay", "LONG")
    assert "nowhere: no folder" in refused("benchmark", "proteingym", "nowhere", run)
    assert "no reference file" in refused("benchmark", "proteingym", run, run)
    assert "benchmark: no model" in refused("benchmark", "proteingym", place, "trainer.accelerator=cpu")
    said = refused("benchmark", "proteingym", place, run, "--beside", "ESM2 (8M)")
    assert "beside=ESM2 (8M): no such model in published results by assay; there are none here" in said
    with pytest.raises(LongseqError, match="passes=-1: take 0 or more"):
        api.benchmark_proteingym(place, run, passes=-1)
    with pytest.raises(LongseqError, match="no model; give at least one"):
        api.benchmark_proteingym(place, [])


def test_score_takes_a_scan_and_says_the_spearman(trained, gym, capsys, folder):
    from longseq.cli import main

    place, _, _ = gym
    run = trained()
    (folder / "wild.fasta").write_text(f">w\n{WILD}\n")
    path = place / "DMS_ProteinGym_substitutions/SHORT_2020.csv"
    assert main(["score", str(run), "wild.fasta", "--variants", str(path), "--variant", "M1A", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert rows[0]["variant"] == "M1A"
    assert len(rows) == 41
    found = by_assay(api.benchmark_proteingym(place, run, assays=["SHORT_2020"]))["SHORT_2020", "substitutions"]
    assert [row["effect"] for row in rows[1:]] == pytest.approx(scores(found).tolist(), abs=1e-4)
    assert f"40 variants, Spearman {found.measures['Spearman']:.4f} with DMS_score" in shown.err
    effects = list(api.variant_effects(run, "wild.fasta", table=path))
    (folder / "one.csv").write_text(" mutant ,\tDMS_score\r\nm1a,0.5\r\n")
    assert main(["score", str(run), "wild.fasta", "--variants", "one.csv"]) == 0
    assert "1 variants, no Spearman with DMS_score, as one of the two is constant" in capsys.readouterr().err
    with path.open(newline="") as file:
        assert [each.measured for each in effects] == [float(row["DMS_score"]) for row in csv.DictReader(file)]
    assert (
        main(["score", str(run), "wild.fasta", "--variants", str(place / "DMS_ProteinGym_indels/SHORT_2020.csv")]) == 1
    )
    assert "its mutants are whole sequences" in capsys.readouterr().err
