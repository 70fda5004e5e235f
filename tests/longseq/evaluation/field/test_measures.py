"""ProteinGym's measures and averages against other implementations, and against values worked out by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional import auroc, matthews_corrcoef, spearman_corrcoef

from documentation.pages import ROOT
from longseq.errors import LongseqError
from longseq.evaluation.field import measures as m
from longseq.evaluation.field.averages import Assay, averages
from longseq.evaluation.field.official import published
from longseq.evaluation.field.tables import rows

SHARED = ROOT.parent / "shared/data/proteingym"


@pytest.fixture
def assay():
    """Measurements, scores with ties, and labels."""
    rng = np.random.default_rng(3)
    measured = rng.normal(size=57)
    scores = np.round(measured + rng.normal(size=57), 1)
    return measured, scores, measured > 0.2


def test_spearman_auc_and_mcc_are_those_of_another_implementation(assay):
    measured, scores, fit = assay
    assert len(set(scores)) < len(scores)
    a, b, labels = torch.tensor(measured), torch.tensor(scores), torch.tensor(fit)
    assert m.spearman(measured, scores) == pytest.approx(float(spearman_corrcoef(b, a)), abs=1e-6)
    assert m.auc(fit, scores) == pytest.approx(float(auroc(b.sigmoid(), labels, task="binary")), abs=1e-6)
    predicted = torch.tensor(m.above_median(scores))
    expected = float(matthews_corrcoef(predicted.int(), labels.int(), task="binary"))
    assert m.mcc(fit, predicted.numpy()) == pytest.approx(expected, abs=1e-6)


def test_equal_values_share_the_mean_of_their_ranks():
    assert m.ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]


def test_ndcg_is_the_gain_of_the_best_tenth_over_the_ideal_one():
    """Of 20 mutants the best two count, with gains 0 … 1 and discounts 1 and 1/log2(3)."""
    measured = np.arange(20.0)
    scores = np.zeros(20)
    scores[[10, 19]] = [2, 1]
    expected = (10 / 19 + 1 / math.log2(3)) / (1 + 18 / 19 / math.log2(3))
    assert m.ndcg(measured, scores) == pytest.approx(expected)
    assert m.ndcg(measured, measured) == pytest.approx(1)
    assert m.ndcg(measured, -measured) == pytest.approx((0 + 1 / 19 / math.log2(3)) / (1 + 18 / 19 / math.log2(3)))


def test_top_recall_takes_what_is_above_the_90th_percentile():
    """Above, as ProteinGym's script has it: not at it."""
    measured, scores = np.arange(21.0), np.arange(21.0)  # the percentile is 18, so 19 and 20 are above it
    assert m.top_recall(measured, scores) == 1
    scores[20], scores[0] = 0, 20
    assert m.top_recall(measured, scores) == 0.5
    assert math.isnan(m.top_recall(np.array([0.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]), np.arange(10.0)))


def test_what_is_not_defined_is_no_number():
    same, ramp = np.ones(20), np.arange(20.0)
    assert math.isnan(m.spearman(same, ramp))
    assert math.isnan(m.auc(same > 0, ramp))
    assert m.mcc(same > 0, ramp > 3) == 0
    found = m.measures(ramp, ramp, None, m.above_median(ramp))
    assert [name for name, value in found.items() if math.isnan(value)] == ["AUC", "MCC"]


def test_measures_by_depth_keep_the_labels_of_the_whole_assay():
    """The median is the assay's, not the depth's: here every double mutant is below it."""
    scores = np.array([9.0, 8, 7, 6, 1, 2, 3, 4])
    fit = np.array([True, True, False, True, False, True, False, True])
    found = m.measures_by_depth(scores.copy(), scores, fit, [1, 1, 1, 1, 2, 2, 7, 5])
    assert list(found) == ["1", "2", "5+"]
    assert found["1"]["Spearman"] == 1
    assert found["2"]["MCC"] == 0  # none above the median
    assert found["2"]["AUC"] == 1


def test_averages_are_over_proteins_then_selection_types():
    """P has three assays of one type, and one of another; Q and R one each: 0.3 and 0.8, whose mean is 0.55."""
    given = [
        ("p1", "P", "Activity", 0.1),
        ("p2", "P", "Activity", 0.2),
        ("p3", "P", "Activity", 0.3),
        ("q", "Q", "Activity", 0.4),
        ("p4", "P", "Stability", 0.7),
        ("r", "R", "Stability", 0.9),
        ("bad", "S", "Stability", math.nan),
    ]
    human = {"P": ("Human", "Low"), "Q": ("Virus", "Low"), "R": ("Human", "High"), "S": ("Human", "High")}
    assays = [Assay(i, p, s, *human[p], 2000 if p == "Q" else 1022) for i, p, s, _ in given]
    depths = {"p1": {"1": 0.5, "2": 0.1}, "p4": {"1": 0.7}, "r": {"1": 0.9}}
    found = averages(assays, {i: value for i, _, _, value in given}, depths)
    assert (found.assays, found.proteins) == (6, 3)
    assert found.average == pytest.approx(0.55)
    assert found.groups["selection type"] == pytest.approx({"Activity": 0.3, "Stability": 0.8})
    # Of P the mean of four assays, 0.325.
    assert found.groups["taxon"] == pytest.approx({"Human": (0.325 + 0.9) / 2, "Virus": 0.4})
    assert found.groups["MSA depth"] == pytest.approx({"Low": (0.325 + 0.4) / 2, "High": 0.9})
    assert found.groups["mutations"] == pytest.approx({"1": 0.7, "2": 0.1})
    by_length = {"up to 1,022 residues": (0.1 + 0.2 + 0.3 + 0.7 + 0.9) / 5, "longer than 1,022": 0.4}
    assert found.groups["length"] == pytest.approx(by_length)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"ProteinGym's published results are not at {SHARED}")
def test_published_averages_of_every_model_come_out_of_its_results_by_assay():
    """Within 0.001, as both files are rounded to three places: 97 models, 217 assays."""
    (table,) = published([SHARED])
    with (SHARED / "Summary_performance_DMS_substitutions_Spearman.csv").open(newline="") as file:
        summary = {row["Model_name"]: row for row in csv.DictReader(file)}
    assert len(summary) == 97
    assert set(table.models) == set(summary)
    columns = {
        "selection type": {name: f"Function_{name}" for name in ("Activity", "Binding", "Expression", "Stability")},
        "taxon": {"Human": "Taxa_Human", "Eukaryote": "Taxa_Other_Eukaryote", "Virus": "Taxa_Virus"},
        "MSA depth": {name: f"{name}_MSA_depth" for name in ("Low", "Medium", "High")},
    }
    for model, row in summary.items():
        found = table.averages(model)
        assert found.average == pytest.approx(float(row["Average_Spearman"]), abs=0.001), model
        for group, names in columns.items():
            for name, column in names.items():
                assert found.groups[group][name] == pytest.approx(float(row[column]), abs=0.001), (model, column)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"ProteinGym's published results are not at {SHARED}")
def test_models_that_cut_long_proteins_lose_there_and_the_site_independent_one_does_not():
    """Lengths come from the reference file; of 16 proteins above 1,022 residues."""
    with (SHARED / "DMS_substitutions.csv").open(newline="", encoding="utf-8") as file:
        lengths = {row["DMS_id"]: len(row["target_seq"]) for row in csv.DictReader(file)}
    (table,) = published([SHARED])
    assays = [Assay(i, a.protein, a.selection, length=lengths[i]) for i, a in table.assays.items()]
    short, long = table.averages("ESM2 (650M)", assays).groups["length"].values()
    assert (round(short, 3), round(long, 3)) == (0.446, 0.341)
    short, long = table.averages("Site-Independent", assays).groups["length"].values()
    assert (round(short, 3), round(long, 3)) == (0.366, 0.402)


def test_a_table_that_is_none_of_proteingyms_is_refused(tmp_path: Path):
    from longseq.errors import LongseqError

    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LongseqError, match=r"results\.csv: no results by assay of ProteinGym"):
        published([tmp_path / "results.csv"])
    (tmp_path / "DMS_indels_AUC_DMS_level.csv").write_text("DMS ID,One\nx,0.25\n")
    (table,) = published([tmp_path])
    assert (table.kind, table.measure, table.models) == ("indels", "AUC", {"One": {"x": 0.25}})
    with pytest.raises(LongseqError, match="has no model 'Two'; it has One"):
        table.averages("Two")


def test_a_quote_that_is_not_closed_takes_no_lines(tmp_path):
    (tmp_path / "a.csv").write_text('mutant,DMS_score,note\nA1C,1.5,"5 inch\nA1D,2.5,x\n')
    with pytest.raises(LongseqError, match=r"a\.csv: no table of text with commas \(unexpected end of data\); give"):
        list(rows(tmp_path / "a.csv"))
