"""`longseq bench data`: every contender reads the same files, and what was measured is kept."""

from __future__ import annotations

import json

import pytest

from command_line import longseq
from longseq.benchmarks.data import CONTENDERS, Measured, ratios


def test_a_table_and_its_numbers_are_kept(tmp_path):
    done = longseq("bench", "data", "--megabytes", 1, "--rounds", 1, "--seconds", 0.05, folder=tmp_path)
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "bench/data/data.json").read_text())
    assert numbers["contenders"].keys() == CONTENDERS.keys()
    assert all(rate > 0 for measured in numbers["contenders"].values() for rate in measured["rates"])
    assert [ratio["goal"] for ratio in numbers["ratios"]] == [0.8, 1.0, 1.0, 1.5]
    assert all(name in done.out for name in CONTENDERS)


def test_every_contender_has_its_cpu_time(tmp_path):
    done = longseq("bench", "data", "--megabytes", 1, "--rounds", 1, "--contenders", "decompress", folder=tmp_path)
    assert done.code == 0, done.err
    assert "CPU seconds" in done.out


def test_ratios_are_taken_round_by_round():
    results = {
        "decompress": Measured("MB", "", [10.0, 100.0, 40.0]),
        "fasta": Measured("MB", "", [9.0, 50.0, 10.0]),
    }
    (ratio,) = ratios(results)
    assert ratio["rounds"] == [0.9, 0.5, 0.25]
    assert ratio["reached"] == 0.5


def test_an_unknown_contender_is_refused(tmp_path):
    assert "'pandas' is not one of" in longseq("bench", "data", "--contenders", "pandas", folder=tmp_path).sentence


def test_the_files_that_are_named_are_read(tmp_path):
    (tmp_path / "a.fasta").write_text("".join(f">r{i}\n{'ACDEFGHIKL' * 9}\n" for i in range(3000)))
    arguments = ("--files", "a.fasta", "--contenders", "decompress,fasta", "--rounds", 1)
    done = longseq("bench", "data", *arguments, folder=tmp_path)
    assert done.code == 0, done.err
    assert "FASTA.gz to batches / decompression" in done.out


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_says_what_it_counts(name):
    unit, about = CONTENDERS[name]
    assert unit in ("MB", "tokens", "sequences")
    assert about
