"""Corpora of proteins as the first version of `longseq data prepare` made them: the same bytes, whatever prepares them.

The numbers were taken from that version, a map and a reduction in a pool of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from corpora import config, data_files, write_files
from longseq_data.prepare.prepare import prepare

ENTRY = """ID   {name}_HUMAN               Reviewed;          {size} AA.
AC   {name};
DE   RecName: Full=Protein {name};
OS   Homo sapiens (Human).
OX   NCBI_TaxID=9606;
SQ   SEQUENCE   {size} AA;  1 MW;  0000000000000000 CRC64;
     {sequence}
//
"""
ODD = (
    ">sp|P1|A_HUMAN a OS=Homo sapiens OX=9606 GN=A PE=1 SV=1\r\nACDEF GHIKL\r\nMN*\r\n"
    "> spaced out TaxID=7\nACDJ-\n>é TaxID=8 RepID=Q_X\nacd\tef\n>twice\nMKV\n>twice\nMKV\n>again\nMKV\n\n"
)
CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "two workers": {"workers": 2},
    "held out": {"ood_taxids": [10239], "min_length": 20, "max_length": 300, "exclude_taxids": [83333]},
    "by id": {"split_by": "id", "unknown": "drop", "max_unknown": 0.01, "valid_fraction": 0.2},
    "copies": {"deduplicate": False, "test_fraction": 0.3},
    "repid": {"split_by": "cluster", "clusters": "repid", "valid_fraction": 0.1},
}
GOLDEN = {
    "plain": "e7a8d29b80b03e4ad558385eaa120d50",
    "two workers": "e7a8d29b80b03e4ad558385eaa120d50",
    "held out": "2dd506daa424cd7d4faedabf3631f61e",
    "by id": "30366fe6ca2ec606c95e76243c981e29",
    "copies": "856e3248b69f79d42a174b361a36f3aa",
    "repid": "56b36e099ffb5fdd581a4161716a80bc",
}


@pytest.mark.parametrize("case", CASES)
def test_proteins_give_the_bytes_of_the_first_version(case, tmp_path, small_parts):
    names = write_files(tmp_path / "files", records=3000, seed=9)
    (tmp_path / "files" / "odd.fasta").write_bytes(ODD.encode())
    entries = [("P12345", "MKVLAEDGHI"), ("P23456", "ACDEFGHIKLMNPQRSTVWYACD"), ("P34567", "MKVLAEDGHI")]
    text = "".join(ENTRY.format(name=name, size=len(letters), sequence=letters) for name, letters in entries)
    (tmp_path / "files" / "some.dat").write_text(text)
    names += [str(tmp_path / "files" / name) for name in ("odd.fasta", "some.dat")]
    manifest, _ = prepare(config(names, tmp_path / "c", **CASES[case]))
    assert digest(tmp_path / "c", manifest.report) == GOLDEN[case]


def digest(corpus: Path, report: dict[str, object]) -> str:
    """Of every file's name and content, and of what was counted."""
    found = hashlib.sha256(json.dumps(report, sort_keys=True).encode())
    for name, content in sorted(data_files(corpus).items()):
        found.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()[:32]
