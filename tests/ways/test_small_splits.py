"""Splits of no record at all, and evaluations shared by more processes than there are records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpora import by_sequence
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from ways.sources import LENGTH
from ways.test_ways import SETTINGS

WORDS = (*SETTINGS, "trainer.max_steps=2", "data.valid_fraction=0.2", "data.test_fraction=0.2")
EMPTY = {"nothing": "", "blank": "\n\n", "a header": ">only\n"}


def fasta(path: Path, split: str | None = None, fraction: float = 0.2) -> str:
    """Thirty records; with a split, those alone that their sequences put elsewhere."""
    proteins = [f"{'MKVLAEDGH'[i % 8 :] * 4}{'ACDEFGHIKL'[i // 8 % 10]}{'ACDEFGHIKL'[i // 80]}" for i in range(200)]
    chosen = [protein for protein in proteins if by_sequence("", protein, fraction, fraction) != split][:30]
    path.write_text("".join(f">r{i}\n{protein}\n" for i, protein in enumerate(chosen)))
    return str(path)


@pytest.mark.parametrize("content", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_file_without_a_record_is_named_before_a_run_is_made(here, refused, split, content):
    Path("empty.fasta").write_text(content)
    files = {"train": fasta(here / "a.fasta"), "valid": "a.fasta", "test": "a.fasta", split: "empty.fasta"}
    sentence = refused("fit", "empty.yaml", *WORDS, *(f"data.{name}={file}" for name, file in files.items()))
    assert str(here / "empty.fasta") in sentence
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize("prepared", [False, True], ids=["files", "corpus"])
def test_a_run_whose_split_is_empty_says_what_to_do(here, longseq, refused, prepared):
    def source(split: str) -> str:
        file = fasta(here / f"no-{split}.fasta", split)
        if not prepared:
            return file
        output = str(here / f"no-{split}")
        prepare(PrepareConfig([file], output, workers=1, valid_fraction=0.2, test_fraction=0.2, deduplicate=False))
        return output

    sentence = refused("fit", "empty.yaml", *WORDS, f"data.train={source('valid')}")
    assert "data.valid" in sentence
    assert "trainer.valid_every=0" in sentence
    longseq("fit", "empty.yaml", *WORDS, f"data.train={source('test')}", "run.name=one")
    sentence = refused("evaluate", "runs/one")
    assert "test split" in sentence
    assert "data.test" in sentence
    longseq("evaluate", "runs/one", "--split", "valid")
    assert "curves.png" in longseq("figures", "runs/one")


@pytest.mark.parametrize("content", EMPTY.values(), ids=EMPTY)
def test_verbs_that_take_a_file_name_one_without_a_record(here, longseq, refused, content):
    longseq("fit", "empty.yaml", *WORDS, f"data.train={fasta(here / 'a.fasta')}", "run.name=one")
    Path("empty.fasta").write_text(content)
    for verb, *options in (("evaluate", "--data"), ("score",), ("embed", "--out", "vectors.npz")):
        assert "empty.fasta" in refused(verb, "runs/one", *options, "empty.fasta")
    assert not Path("vectors.npz").exists()


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_more_processes_than_records_count_the_same(here, longseq, objective):
    train, test = fasta(here / "a.fasta"), here / "test.fasta"
    test.write_text(f">one\n{'MKV' * LENGTH}\n>two\nW\n")
    keys = (f"data.train={train}", f"data.test={test}", "data.packing=crop", f"model.objective={objective}")
    longseq("fit", "empty.yaml", *WORDS, *keys, "run.name=one")
    one, three = (json.loads(longseq("evaluate", "runs/one", "--json", "--devices", n)) for n in (1, 3))
    assert one["splits"] == three["splits"]
    assert one["splits"]["test"]["sequences"] == 5  # windows of the long record, and the short one
