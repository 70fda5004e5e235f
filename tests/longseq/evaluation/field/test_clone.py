"""Folders as people have them: a clone of ProteinGym's repository with its downloads unpacked in it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import longseq as api
from longseq.cli import main
from longseq.errors import LongseqError
from longseq.evaluation.field.assays import collection
from longseq.evaluation.field.official import published

WILD = "MKVLAACDEFGHIKLMNPQRSTVWY"
FACTS = ("Number of Mutants", "Selection Type", "UniProt ID", "MSA_Neff_L_category", "Taxon")
MEASURES = ("Spearman", "AUC", "MCC", "NDCG", "Top_recall")


def write(path: Path, header: tuple[str, ...], *rows: tuple[object, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def clone(folder: Path) -> Path:
    """Files, columns and names of the repository (2025), in small; the unpacked assays next to them."""
    place = folder / "ProteinGym"
    refer = place / "reference_files"
    header = ("DMS_index", "DMS_id", "DMS_filename", "UniProt_ID", "taxon", "target_seq", "DMS_binarization_cutoff")
    header += ("MSA_Neff_L_category", "coarse_selection_type")
    names = ("A_2020", "B_2021")
    rows = [
        (f"DMS_sub_{n}", name, f"{name}.csv", name[0], "Human", WILD, 0.5, "high", "Activity")
        for n, name in enumerate(names)
    ]
    write(refer / "DMS_substitutions.csv", header, *rows)
    write(
        refer / "DMS_indels.csv",
        header[1:],
        ("A_2020_indels", "A_2020_indels.csv", "A", "Human", WILD, 0.5, "High", "Stability"),
    )
    write(
        refer / "clinical_substitutions.csv",
        ("DMS_id", "target_seq", "file_length", "DMS_filename", "MSA_filename"),
        ("NP_1.1", WILD, 25, "NP_1.1.csv", "NP_1.a2m"),
    )
    write(
        refer / "clinical_indels.csv",
        ("DMS_id", "DMS_filename", "target_seq", "mutated_sequence_column", "dataset"),
        ("NP_1.1", "NP_1.1.csv", WILD, "mutated_sequence", "ClinVar"),
    )
    zero = place / "benchmarks/DMS_zero_shot/substitutions"
    for n, measure in enumerate(MEASURES):
        write(
            zero / f"{measure}/DMS_substitutions_{measure}_DMS_level.csv",
            ("DMS ID", "ESM2 (8M)", *FACTS),
            *[
                (name, round(0.1 * n + 0.2 * at, 1), 3, "Activity", name[0], "High", "Human")
                for at, name in enumerate(names)
            ],
        )
        write(zero / f"{measure}/Summary_performance_DMS_substitutions_{measure}.csv", ("Model_rank",), (1,))
    for other in ("benchmarks/DMS_supervised/substitutions", "proteingym/baselines/kermut/results/summary"):
        for fold in ("", "_fold_random_5"):
            table = place / other / f"Spearman/DMS_substitutions_Spearman_DMS_level{fold}.csv"
            write(table, ("DMS_id", "ESM2 (8M)"), *[(name, 0.9) for name in names])
    write(
        place / "benchmarks/clinical_zero_shot/substitutions/AUC/clinical_substitutions_AUC_DMS_level.csv",
        ("DMS ID", "ESM2 (8M)"),
        ("NP_1.1", 0.8),
    )
    for name in names:
        write(
            place / f"DMS_ProteinGym_substitutions/{name}.csv",
            ("mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"),
            *[(f"K2{new}", f"M{new}{WILD[2:]}", score, int(score > 0.5)) for score, new in enumerate("ACD")],
        )
    write(
        place / "clinical_ProteinGym_substitutions/NP_1.1.csv",
        ("protein", "protein_sequence", "mutant", "mutated_sequence", "DMS_bin_score"),
        ("NP_1.1", WILD, "K2A", f"MA{WILD[2:]}", "Benign"),
    )
    return place


def test_a_clone_is_scored_next_to_the_results_that_were_not_trained_on_it(trained, clone: Path, capsys) -> None:
    run = trained()
    found = api.benchmark_proteingym(clone, run)
    assert [(each.assay.id, each.kind) for each in found.models[0].assays] == [
        ("A_2020", "substitutions"),
        ("B_2021", "substitutions"),
    ]
    assert found.absent == ["A_2020_indels"]
    assert [path.name for path in found.passed_over] == ["clinical_indels.csv", "clinical_substitutions.csv"]
    official = found.compared("substitutions")["ESM2 (8M), published"]
    averages = {measure: each.average for measure, each in official.items()}
    assert averages == pytest.approx({"Spearman": 0.1, "AUC": 0.2, "MCC": 0.3, "NDCG": 0.4, "Top_recall": 0.5})
    assert main(["benchmark", "proteingym", str(clone), str(run)]) == 0
    shown, said = capsys.readouterr()
    (line,) = [line for line in shown.splitlines() if line.startswith("ESM2 (8M), published  ")][:1]
    assert line.split()[3:] == ["0.100", "0.200", "0.300", "0.400", "0.500", "2"]
    assert "reference_files/clinical_indels.csv lists labels from the clinic, which are not scored here" in said
    assert "1 assays of the reference are not here: A_2020_indels" in said


def test_published_results_without_the_rank_correlation_are_shown(trained, clone: Path, longseq) -> None:
    for path in clone.rglob("DMS_substitutions_Spearman_DMS_level.csv"):
        path.unlink()
    shown = longseq("benchmark", "proteingym", clone, trained())
    (line,) = [line for line in shown.splitlines() if line.startswith("ESM2 (8M), published  ")]
    assert line.split()[3:] == ["–", "0.200", "0.300", "0.400", "0.500", "2"]


def test_results_of_trained_models_that_are_named_are_refused(clone: Path) -> None:
    table = clone / "benchmarks/DMS_supervised/substitutions/Spearman/DMS_substitutions_Spearman_DMS_level.csv"
    with pytest.raises(LongseqError, match="no results of ProteinGym without training: it has no column 'DMS ID'"):
        published([table])


def test_labels_from_the_clinic_are_refused_by_name(clone: Path) -> None:
    for name in ("DMS_substitutions.csv", "DMS_indels.csv"):
        (clone / "reference_files" / name).unlink()
    said = r"clinical_indels\.csv: lists labels from the clinic, .* give ProteinGym's DMS_substitutions\.csv or DMS_in"
    with pytest.raises(LongseqError, match=said):
        collection(clone)
    with pytest.raises(LongseqError, match=r"clinical_substitutions\.csv: lists labels"):
        collection(clone, clone / "reference_files/clinical_substitutions.csv")


def test_tables_that_merely_lie_there_do_not_matter(clone: Path) -> None:
    (clone / "mine.csv").write_text("a,a\n1,2\n")
    (clone / "photo.csv").write_bytes(b"\xff\xd8\xff")
    assert [entry.assay.id for entry in collection(clone).entries] == ["A_2020", "B_2021"]
    for path in (clone / "reference_files").glob("*.csv"):
        path.unlink()
    with pytest.raises(LongseqError, match=r"mine\.csv: two columns are called a"):
        collection(clone)


def test_other_downloads_whose_files_are_called_as_the_assays_are_none(clone: Path) -> None:
    assay = clone / "DMS_ProteinGym_substitutions/B_2021.csv"
    for name in ("cv_folds_singles_substitutions", "substitutions_raw_DMS", "zero_shot_substitutions_scores"):
        (clone / name).mkdir()
        (clone / name / assay.name).write_bytes(assay.read_bytes())
    assay.unlink()
    found = collection(clone)
    assert [entry.assay.id for entry in found.entries] == ["A_2020"]
    assert found.absent == ["A_2020_indels", "B_2021"]
