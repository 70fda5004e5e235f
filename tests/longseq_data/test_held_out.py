"""Which records form the ood split, and lists and settings that are refused."""

from __future__ import annotations

import gzip

import pytest

from corpora import LETTERS, config, expected, found, made
from longseq_data.errors import DataError
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.fasta import read_records


def rows_of(split: dict[str, tuple[str, int]]) -> set[str]:
    return set(split)


def test_a_list_of_ids_makes_the_ood_split(files, tmp_path):
    ids = [record.identifier for record in read_records(files[0])][:300]
    listed = tmp_path / "ids.txt"
    # whole ids, accessions, headers, comments
    listed.write_text(
        "# held out\n"
        + "\n".join(ids[:100])
        + "\n\n"
        + "\n".join(name.removeprefix("UniRef50_") for name in ids[100:200])
        + "\n"
        + "".join(f">{name} a protein  # note\n" for name in ids[200:])
    )
    wanted = expected(files, held_out=lambda identifier, taxid: identifier in set(ids))
    assert len(wanted["ood"]) > 250
    assert made(files, tmp_path / "c", ood_ids=str(listed)) == wanted
    (tmp_path / "ids.gz").write_bytes(gzip.compress(listed.read_bytes()))
    assert made(files, tmp_path / "d", ood_ids=str(tmp_path / "ids.gz"), workers=2) == wanted


P12345 = ["sp|P12345|A_B", "tr|P12345|C_D", "UniRef90_P12345", "P12345-2", "UniRef100_P12345-3", "P12345"]


@pytest.mark.parametrize(
    ("listed", "held_out"),
    [
        ("P12345", P12345),
        ("P12345-2", ["P12345-2"]),
        (
            "sp|P12345|A_B",
            ["sp|P12345|A_B", "tr|P12345|C_D", "UniRef90_P12345", "P12345-2", "UniRef100_P12345-3", "P12345"],
        ),
        ("r", ["r"]),
        ("r-1", ["r-1"]),
    ],
)
def test_records_are_found_by_accession(listed, held_out, write, tmp_path):
    names = [*P12345, "r", "r-1", "r-2", "P123456", "A0A023GPI8"]
    source = write("a.fasta", "".join(f">{name}\n{LETTERS[i:]}\n" for i, name in enumerate(names)))
    rows = made([source], tmp_path / "c", ood_ids=write("ids", listed))
    assert rows_of(rows["ood"]) == set(held_out)


def test_taxids_make_the_ood_split_and_take_copies_with_them(files, tmp_path):
    wanted = expected(files, held_out=lambda identifier, taxid: taxid == 10239)
    rows = made(files, tmp_path / "c", ood_taxids=[10239])
    assert rows == wanted
    assert {taxid for _, taxid in rows["ood"].values()} != {10239}  # a copy of a held-out sequence is held out
    assert 10239 not in {taxid for name in ("train", "valid", "test") for _, taxid in rows[name].values()}


PFAM_TSV = (
    "Entry\tEntry Name\tPfam\nA00001\tx\tPF00001;\nA00002\ty\tPF00002;PF00001;\nA00003\tz\tPF00003;\nA00004\tw\t\n"
    "A00005\tv\tPF00004.12\n"
)
PFAM_FASTA = "".join(f">UniRef50_A0000{i}\n{LETTERS[i:]}\n" for i in range(1, 7))


@pytest.mark.parametrize(
    ("families", "held_out"), [(["PF00001"], {1, 2}), (["PF00002", "PF00004"], {2, 5}), (["PF00003"], {3})]
)
def test_pfam_families_make_the_ood_split(families, held_out, write, tmp_path):
    rows = made(
        [write("a.fasta", PFAM_FASTA)], tmp_path / "c", ood_pfam_map=write("p.tsv", PFAM_TSV), ood_pfam=families
    )
    assert rows_of(rows["ood"]) == {f"UniRef50_A0000{i}" for i in held_out}


def test_a_map_needs_no_header(write, tmp_path):
    rows = made(
        [write("a.fasta", PFAM_FASTA)],
        tmp_path / "c",
        ood_pfam_map=write("p.tsv", "A00001\tPF00001,PF00002\nA00003\tPF00003\n"),
        ood_pfam=["PF00002"],
    )
    assert rows_of(rows["ood"]) == {"UniRef50_A00001"}


def test_families_are_drawn_by_the_seed(write, tmp_path):
    tsv = "Entry\tPfam\n" + "".join(f"A{i:05d}\tPF{i % 40:05d};PF{(i * 7) % 40:05d};\n" for i in range(400))
    fasta = "".join(f">UniRef50_A{i:05d}\n{LETTERS}{LETTERS[i % 20]}{LETTERS[i // 20]}\n" for i in range(400))
    source, mapped = write("a.fasta", fasta), write("p.tsv", tsv)
    drawn = []
    for number, seed in enumerate([0, 1, 0]):
        manifest, _ = prepare(
            config([source], tmp_path / f"c{number}", ood_pfam_map=mapped, ood_pfam_random=5, seed=seed)
        )
        families = manifest.report["held_out_families"]
        assert len(set(families)) == 5
        members = {
            f"UniRef50_A{i:05d}"
            for i in range(400)
            if {f"PF{i % 40:05d}", f"PF{(i * 7) % 40:05d}"} & set(families)  # type: ignore[arg-type]
        }
        assert rows_of(found(tmp_path / f"c{number}")["ood"]) == members
        drawn.append(families)
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ood_ids": ""}, "ood_ids has no ids; write one a line."),
        ({"ood_ids": "# nothing\n"}, "ood_ids has no ids; write one a line."),
        ({"ood_pfam_map": "A\tPF1\n", "ood_pfam": ["PF00001"]}, "line 1: 'PF1' is no Pfam accession;"),
        ({"ood_pfam_map": "A\tPF00001\nB\n", "ood_pfam": ["PF00001"]}, "line 2: a row needs an id and its Pfam"),
        ({"ood_pfam_map": "A\tPF00001\n", "ood_pfam": ["PF00002"]}, "no record belongs to PF00002 of ood_pfam;"),
        ({"ood_pfam_map": "A\tPF00001\n", "ood_pfam_random": 2}, "ood_pfam_random=2, and the file has 1 families;"),
    ],
)
def test_bad_lists_are_refused_with_their_line(changes, sentence, write, tmp_path):
    for name in ("ood_ids", "ood_pfam_map"):
        if name in changes:
            changes = {**changes, name: write("list", changes[name])}
    with pytest.raises(DataError) as refused:
        prepare(config([write("a.fasta", PFAM_FASTA)], tmp_path / "c", **changes))
    assert str(refused.value).startswith(str(tmp_path / "list"))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sources": []}, "sources is empty"),
        ({"output": " "}, "output is missing"),
        ({"min_length": 5, "max_length": 4}, "max_length=4 is below min_length=5"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train"),
        ({"include_taxids": [1], "exclude_taxids": [1]}, "TaxID 1 is in include_taxids and in exclude_taxids"),
        ({"ood_taxids": [1], "exclude_taxids": [1]}, "TaxID 1 is in ood_taxids and in exclude_taxids"),
        ({"ood_taxids": [1], "include_taxids": [2]}, "TaxID 1 of ood_taxids is not in include_taxids"),
        ({"ood_pfam": ["PF00001"]}, "ood_pfam_map is missing"),
        ({"ood_pfam_random": 3}, "ood_pfam_map is missing"),
        ({"ood_pfam_map": "m"}, "ood_pfam_map alone holds nothing out"),
        ({"ood_pfam_map": "m", "ood_pfam": ["PF1"]}, "'PF1' is no Pfam accession"),
        ({"ood_pfam_map": "m", "ood_pfam": ["PF00001"], "ood_pfam_random": 1}, "are both set"),
        ({"ood_ids": "missing"}, "no such file"),
        ({"min_length": 10_000}, "no record passes the filters (9,000 too short)"),
        ({"sources": ["missing.fasta"]}, "missing.fasta does not exist"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence, files, tmp_path):
    with pytest.raises(DataError) as refused:
        prepare(config(files, tmp_path / "c", **changes))
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "c").exists()
