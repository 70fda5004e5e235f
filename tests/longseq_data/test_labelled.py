"""Tables of labelled sequences: what is read of them, what is refused, and the samples they become."""

from __future__ import annotations

import gzip
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from longseq_data.errors import DataError
from longseq_data.readers.label_table import LabelSpec, is_table, read_table, task_of
from longseq_data.samples.label_samples import LabelledSamples
from longseq_data.samples.rank_share import Share
from longseq_data.splits import SplitRule
from longseq_data.vocabulary import ALPHABETS, IGNORE, PROTEIN

ROWS = [("a", "MKV", "0.5"), ("b", "MKVL", "-1e1"), ("c", "WW", "3")]


def write(path: Path, header: str, *rows: str, compress: bool = False) -> str:
    text = "\n".join([header, *rows, ""])
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return str(path)


def spec(source: str, task: str = "regression", **more: object) -> LabelSpec:
    return LabelSpec(source, "protein", "sequence", "label", task, **more)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "semicolons.csv", "bom.csv", "crlf.csv", "t.txt"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path, name):
    comma = "\t" if "tsv" in name or "txt" in name else ";" if "semi" in name else ","
    end = "\r\n" if name == "crlf.csv" else "\n"
    text = end.join(comma.join(row) for row in [("id", "sequence", "label"), *ROWS]) + end
    data = ("\ufeff" if name == "bom.csv" else "").encode() + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    table = read_table(str(tmp_path / name))
    assert table.columns == {"id": ["a", "b", "c"], "sequence": ["MKV", "MKVL", "WW"], "label": ["0.5", "-1e1", "3"]}
    assert is_table(name) == (not name.endswith("txt"))


@pytest.mark.parametrize(
    ("header", "sequence", "label"),
    [
        ("sequence,label", "sequence", "label"),
        ("mutant,mutated_sequence,DMS_score,DMS_score_bin", "mutated_sequence", "DMS_score"),
        ("id,Sequence,melting point", "Sequence", "melting point"),
        (",sequence,melting point,", "sequence", "melting point"),  # an index, and a comma too many
    ],
)
def test_columns_are_found_by_their_names(tmp_path, header, sequence, label):
    table = read_table(write(tmp_path / "t.csv", header, ",".join("1" for _ in header.split(","))))
    assert table.sequence_column(None) == sequence
    assert table.label_column(None, [sequence]) == label


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("sequence,seq,label", "several may hold the sequences (sequence, seq); name the one with --sequence"),
        ("protein,label,a", "none is known to hold the sequences; name the one with --sequence"),
        ("sequence,score,fitness", "several may hold the labels (score, fitness); name the one with --label"),
        ("sequence,a,b", "none is known to hold the labels; name the one with --label"),
    ],
)
def test_columns_that_may_be_several_are_asked_for_by_name(tmp_path, header, sentence):
    table = read_table(write(tmp_path / "t.csv", header, "1,1,1"))
    with pytest.raises(DataError) as raised:
        table.label_column(None, [table.sequence_column(None)])
    assert sentence in str(raised.value)
    assert header.replace(",", ", ") in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["0.5", "1"], "regression"),
        (["1e3", "", "nan"], "regression"),
        (["0", "1", "1"], "classification"),
        (["yes", "no", "NA"], "classification"),
        (["HHE", "EE-", "---"], "residue-classes"),
        (["[0.5, null, 1]", "[1, 2, 3]"], "residue-numbers"),
        (["0.5 1 2", "1,2,3"], "residue-numbers"),
        (['["H", "E", null]'], "residue-classes"),
        (["H", "E"], "classification"),
        (["1_00", "2_00"], "classification"),  # names, which Python reads as 100 and 200
        (["[null, null, null]", '["H", "E", null]'], "residue-classes"),
    ],
)
def test_the_task_follows_from_the_labels(tmp_path, labels, task):
    rows = (f'MKV;"{label.replace(chr(34), 2 * chr(34))}"' for label in labels)
    assert task_of(read_table(write(tmp_path / "t.csv", "sequence;label", *rows)), "sequence", "label") == task


def test_numbers_among_words_are_asked_about(tmp_path):
    """One of 1,000 that says "n.d." would make a class of each number."""
    table = read_table(write(tmp_path / "t.csv", "sequence,label", "M,1.5", "K,", "V,n.d.", "L,2.5"))
    with pytest.raises(DataError, match=r"label holds numbers and also 'n\.d\.'; .* --task classification"):
        task_of(table, "sequence", "label")


def test_whole_numbers_may_be_classes_or_amounts(tmp_path):
    table = read_table(write(tmp_path / "t.csv", "sequence,label", "M,1", "K,2", "V,3"))
    with pytest.raises(DataError, match=r"label holds whole numbers, 3 different ones, .* --task classification or"):
        task_of(table, "sequence", "label")


@pytest.mark.parametrize(
    ("rows", "more", "sentence"),
    [
        (["MKV,abc"], {}, "row 1: label is 'abc', which is no number; correct it"),
        (["MKV,1", "M,inf"], {}, "row 2: label is 'inf', which is no number"),
        (["MKV,1", "M,1_0"], {}, "row 2: label is '1_0', which is no number"),
        (["MJV,1"], {}, "row 1, sequence: 'J' at position 2 is not one of ACDEF"),
        ([",1"], {}, "row 1, sequence: is empty"),
        (["MKV,"], {}, "no row has a label in label"),
        (["MKV,1,2"], {}, "no table with a header and equally long rows"),
        (["MKV,x"], {"task": "classification", "classes": ("a", "b")}, "label is 'x', a class that the model has not"),
        (["MKV,HH"], {"task": "residue-classes"}, "row 1: label has 2 labels, but sequence 3 residues"),
        (["MKV,[1 2"], {"task": "residue-numbers"}, "begins with [ and is no list"),
        (["MKV,1"], {"sequence": "seq"}, "has no column 'seq' for the sequences; its columns are sequence, label"),
        (["MKV,1"], {"split": "label"}, "row 1: label is '1'; write train, valid or test"),
        ([], {}, "a table without rows"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_its_row(tmp_path, rows, more, sentence):
    given = {"sequence": "sequence", "label": "label", "task": "regression", **more}
    with pytest.raises(DataError) as raised:
        LabelSpec(write(tmp_path / "t.csv", "sequence,label", *rows), "protein", **given).read()
    assert sentence in str(raised.value)


def test_other_files_are_no_tables(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_table(str(tmp_path / "empty.csv"))
    with pytest.raises(DataError, match="'label' is the name of several columns"):
        read_table(write(tmp_path / "t.csv", "sequence,label,label", "M,1,2"))
    with pytest.raises(DataError, match=r"gone\.csv"):
        read_table(str(tmp_path / "gone.csv"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"sequence,label\nM,1\n" * 999)[:-30])
    with pytest.raises(DataError, match="truncated"):
        read_table(str(tmp_path / "cut.csv.gz"))


def test_rows_without_label_or_split_are_left_out_and_counted(tmp_path):
    rows = ["MK,1.5,train", "MV,,train", "ML,nan,test", "MA,2,", "MG,3,Validation", "MH,4,test"]
    found = spec(write(tmp_path / "t.csv", "sequence,label,split", *rows), split="split").read()
    assert (found.rows, found.splits) == ([0, 4, 5], ["train", "valid", "test"])
    assert [float(label[0]) for label in found.labels] == [1.5, 3.0, 4.0]
    assert found.left_out == (2, 1)


def test_residues_without_a_label_are_not_scored(tmp_path):
    source = write(tmp_path / "t.csv", "sequence;label", "MKV;[1, null, 2.5]", "MK;NaN 4")
    numbers = spec(source, "residue-numbers").read().labels
    np.testing.assert_array_equal(numbers[0], [1, math.nan, 2.5])
    np.testing.assert_array_equal(numbers[1], [math.nan, 4])
    source = write(tmp_path / "c.csv", "sequence;label", 'MKV;["""H""", null, "E"]'.replace('"""', '"'), "MK;EE")
    found = spec(source, "residue-classes").read()
    assert found.classes == ("E", "H")
    assert found.labels[0].tolist() == [1, IGNORE, 0]
    found = spec(write(tmp_path / "n.csv", "sequence;label", 'MKVL;["H", NaN, "NA", "E"]'), "residue-classes").read()
    assert found.labels[0].tolist() == [1, IGNORE, IGNORE, 0]


def test_blanks_are_states_of_residues_and_nothing_to_a_sequence(tmp_path):
    source = write(tmp_path / "t.csv", "sequence,label", "MKVL, HH ", "MKLA,HEE ", "MK,  ")
    assert task_of(read_table(source), "sequence", "label") == "residue-classes"
    found = spec(source, "residue-classes").read()
    assert (found.classes, found.left_out) == ((" ", "E", "H"), (1, 0))
    assert [row.tolist() for row in found.labels] == [[0, 2, 2, 0], [2, 1, 1, 0]]
    assert spec(source, "classification").read().classes == ("HEE", "HH")


@pytest.mark.parametrize("mark", ['"', '"open'])
@pytest.mark.parametrize("last", ["", '"'])
def test_a_quote_that_is_not_closed_takes_no_rows(tmp_path, mark, last):
    """Of 5' ends and inches in a description, as tables with tabs have them."""
    rows = ["MKV\t1.5\tone", f"MKL\t2.5\t{mark}", "MKA\t3.5\ttwo", f"MKC\t4.5\t{last}", ""]
    source = write(tmp_path / "t.tsv", "sequence\tlabel\tname", *rows)
    with pytest.raises(DataError, match=r"t\.tsv, row 2: name holds the lines that follow, as a quotation mark is not"):
        read_table(source)
    inches = write(tmp_path / "t.csv", "sequence,label", 'MKV,"1.5', "MKL,2.5", 'MKA,3"')
    with pytest.raises(DataError, match=r"t\.csv, row 1: label holds the lines"):
        read_table(inches)


def test_a_cell_of_several_lines_may_have_as_many_commas_as_a_row(tmp_path):
    cells = [
        "two\nlines, or 3",
        "one\nof 1, 2, 3 and 4\nmore",
        "a,b,c\nd,e,f,g\nh",
        'a ""word""\nx, y, z',
        "x" * 140_000 + "\n,,,",
    ]
    rows = [f'MKV,1.5,"{cell}"' for cell in cells]
    table = read_table(write(tmp_path / "t.csv", "sequence,label,name", *rows))
    assert table.columns["name"] == [cell.replace('""', '"') for cell in cells]
    assert table.columns["label"] == ["1.5"] * len(cells)


def test_classes_are_sorted_as_text_or_as_numbers(tmp_path):
    words = write(tmp_path / "w.csv", "sequence,label", "M,b", "K,a", "V,10")
    numbers = write(tmp_path / "n.csv", "sequence,label", "M,10", "K,9", "V,10")
    assert spec(words, "classification").read().classes == ("10", "a", "b")
    assert spec(numbers, "classification").read().classes == ("9", "10")


def sequences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("ACDEFGHIKL"), size=5 + i % 7)) for i in range(count)]


def test_splits_are_those_of_prepared_data(tmp_path):
    rows = [f"{letters},{i}.5" for i, letters in enumerate(sequences(200))]
    found = spec(write(tmp_path / "t.csv", "sequence,label", *rows), valid_fraction=0.1, test_fraction=0.2).read()
    rule = SplitRule(0.1, 0.2, by="sequence")
    table = ALPHABETS["protein"].table
    assert found.splits == [rule.split("x", letters.encode().translate(table)) for letters in sequences(200)]
    assert min(Counter(found.splits).values()) > 10


def test_clusters_stay_together(tmp_path):
    rows = [f"{letters},{i}.5,c{i // 5}" for i, letters in enumerate(sequences(200))]
    source = write(tmp_path / "t.csv", "sequence,label,family", *rows)
    found = spec(source, cluster="family", valid_fraction=0.2, test_fraction=0.2).read()
    assert set(found.splits) == {"train", "valid", "test"}
    assert all(len(set(found.splits[first : first + 5])) == 1 for first in range(0, 200, 5))


def test_a_column_without_valid_rows_leaves_them_to_the_hash(tmp_path):
    rows = [f"{letters},{i}.5,{'test' if i % 4 == 0 else 'train'}" for i, letters in enumerate(sequences(200))]
    found = spec(write(tmp_path / "t.csv", "sequence,label,split", *rows), split="split", valid_fraction=0.2).read()
    assert [each == "test" for each in found.splits] == [i % 4 == 0 for i in range(200)]
    assert 10 < found.splits.count("valid") < 60


def samples(tmp_path: Path, task: str = "regression", split: str | None = None) -> LabelledSamples:
    label = "HE-" if task == "residue-classes" else "1.5"
    rows = [
        f"{letters},{(label * 9)[: len(letters)] if len(label) == 3 and task != 'regression' else f'{i}.25'}"
        for i, letters in enumerate(sequences(21))
    ]
    of = spec(write(tmp_path / "t.csv", "sequence,label", *rows), task)
    return LabelledSamples(of, split, PROTEIN, PROTEIN.bos, seed=3, center=10.0, scale=4.0)


def rows_of(found: LabelledSamples, batch: dict) -> list[int]:
    """Which rows are in a batch, by their labels; padding is left out."""
    bits = batch["targets"][:, 0].astype(np.int32)
    numbers = bits.view(np.float32)[bits != IGNORE] * 4 + 10
    return np.round(numbers - 0.25).astype(int).tolist()


def test_labels_stand_in_a_batch_as_they_were(tmp_path):
    found = samples(tmp_path)
    batch = found.batch(np.array([2, 20]), 3, {"step_targets": 2, "samples": 9})
    assert rows_of(found, batch) == [2, 20]
    for number, row in enumerate((2, 20)):
        letters = sequences(21)[row]
        ids = [PROTEIN.bos, *letters.encode().translate(ALPHABETS["protein"].table), PROTEIN.eos]
        assert batch["tokens"][number].tolist() == ids + [PROTEIN.pad] * (batch["tokens"].shape[1] - len(ids))
    assert set(batch["tokens"][2].tolist()) == {PROTEIN.pad}
    assert (int(batch["step_targets"]), int(batch["samples"])) == (2, 9)
    classes = samples(tmp_path, "residue-classes")
    batch = classes.batch(np.array([0]), 1)
    assert classes.rows.classes == ("-", "E", "H")
    assert batch["targets"][0].tolist() == [IGNORE, 2, 1, 0, 2, 1, IGNORE]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_a_step_has_the_same_rows_however_it_is_shared_out(tmp_path, world, accumulate):
    found = samples(tmp_path)
    size = 6 // (world * accumulate)
    steps: list[list[int]] = [[] for _ in range(7)]
    for rank in range(world):
        made = found.training(12, Share(size, accumulate, rank, world))
        for step in steps:
            for _ in range(accumulate):
                batch = next(made)()
                assert int(batch["step_targets"]) == 6 // world
                step += rows_of(found, batch)
    alone = found.training(12, Share(6, 1, 0, 1))
    assert [sorted(step) for step in steps] == [sorted(rows_of(found, next(alone)())) for _ in steps]


def test_an_epoch_has_every_row_once(tmp_path):
    found = samples(tmp_path)
    made = found.training(0, Share(7, 1, 0, 1))
    epochs = [[row for _ in range(3) for row in rows_of(found, next(made)())] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(21))] * 2
    assert epochs[0] != epochs[1]
    assert found.epochs(42) == {"": 2.0}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_validation_has_every_row_once_and_as_many_batches_on_every_rank(tmp_path, world):
    found = samples(tmp_path)
    ranks = [[make() for make in found.evaluation(Share(4, 1, rank, world))] for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for batch in batches for row in rows_of(found, batch)) == list(range(21))
    few = [make() for make in found.evaluation(Share(4, 1, 0, 1), 5)]
    assert [rows_of(found, batch) for batch in few] == [[0, 1, 2, 3], [4]]
