"""FASTA, UniProtKB flat text and XML, UniRef XML: one door, equal records."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from corpora import config, found
from longseq_data.prepare.prepare import prepare
from longseq_data.readers import uniprot_xml
from longseq_data.readers.fasta import Encoder, read_records
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.uniprot import parse_header
from protein_formats import PROTEINS, WRITERS, Protein, fasta, flat, uniref_xml, xml

Write = Callable[..., str]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_records_of_the_fasta_file(name: str, zipped: bool, write: Write):
    content = WRITERS[name](PROTEINS).encode()
    source = write("anything.txt", gzip.compress(content) if zipped else content)
    expected = read_records(write("x.fasta", fasta(PROTEINS)))
    found = list(read_proteins(source))
    assert [(r.identifier, r.description, r.sequence) for r in found] == [
        (r.identifier, r.description, r.sequence) for r in expected
    ]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
def test_every_format_is_prepared_as_the_fasta_file_is(zipped: bool, write: Write, tmp_path: Path):
    corpora = {}
    for name, text in WRITERS.items():
        content = text(PROTEINS).encode()
        source = write(f"{name}.txt", gzip.compress(content) if zipped else content)
        settings = {"format": "fasta", "valid_fraction": 0.2, "test_fraction": 0.2}
        settings |= {"ood_taxids": [9606], "exclude_taxids": [11706]}
        manifest, _ = prepare(config([source], tmp_path / name, **settings))
        corpora[name] = (manifest.fingerprint, found(tmp_path / name))
    rows = {key: row for split in corpora["fasta"][1].values() for key, row in split.items()}
    assert rows == {
        f"{'sp' if p.reviewed else 'tr'}|{p.accession}|{p.entry}": (p.sequence, p.taxid)
        for p in PROTEINS
        if p.taxid != 11706
    }
    assert {taxid for _, taxid in corpora["fasta"][1]["ood"].values()} == {9606}
    assert corpora["dat"] == corpora["fasta"]
    assert corpora["xml"] == corpora["fasta"]


@pytest.mark.parametrize(("name", "biopython"), [("dat", "swiss"), ("xml", "uniprot-xml")])
def test_sequences_accessions_and_taxids_are_those_of_biopython(name: str, biopython: str, write: Write):
    from Bio import SeqIO

    source = write(f"a.{name}", WRITERS[name](PROTEINS))
    records = list(read_proteins(source))
    expected = list(SeqIO.parse(source, biopython))
    assert [parse_header(r.description).identifier for r in records] == [e.id for e in expected]
    assert [parse_header(r.description).entry for r in records] == [e.name for e in expected]
    assert [r.sequence for r in records] == [str(e.seq) for e in expected]
    if name == "dat":
        taxids = [int(e.annotations["ncbi_taxid"][0]) for e in expected]
    else:
        taxids = [
            next(int(x[14:]) for x in e.dbxrefs if x.startswith("NCBI Taxonomy:") and x[14:] != "9913")
            for e in expected
        ]
    assert [parse_header(r.description).taxid for r in records] == taxids == [p.taxid for p in PROTEINS]


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_the_line_of_a_record_is_where_its_entry_begins(name: str, write: Write):
    text = "\n" * (name == "dat") + WRITERS[name](PROTEINS)
    starts = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith(("ID  ", "<entry"))]
    assert [r.line for r in read_proteins(write("a", text))] == starts


def test_formats_by_url(http_address: str, write: Write):
    write("a.bin", gzip.compress(xml(PROTEINS).encode()))
    write("b.bin", flat(PROTEINS))
    assert [r.sequence for r in read_proteins(f"{http_address}/a.bin")] == [p.sequence for p in PROTEINS]
    assert [r.sequence for r in read_proteins(f"{http_address}/b.bin")] == [p.sequence for p in PROTEINS]


def test_uniref_xml_gives_uniref_headers(write: Write):
    records = list(read_proteins(write("a.xml", uniref_xml())))
    assert [r.description for r in records] == [
        f"UniRef50_Q{i} protein <{i}> n={i + 1} Tax=Taxon x={i} TaxID={10 + i} RepID=Q{i}_HUMAN" for i in range(7)
    ]
    assert [r.sequence for r in records] == ["A" * 60 + "C" * (i + 1) for i in range(7)]


def test_entries_of_the_first_releases_are_read(write: Write):
    text = """ID   104K_THEPA     STANDARD;      PRT;     4 AA.
AC   P15711;
DT   01-APR-1990 (Rel. 14, Created)
DT   01-APR-1990 (Rel. 14, Last sequence update)
DT   01-AUG-1992 (Rel. 23, Last annotation update)
DE   104 KD MICRONEME-RHOPTRY ANTIGEN.
OS   THEILERIA PARVA.
SQ   SEQUENCE   4 AA;  103625 MW;  289B4B554A61870E CRC64;
     MKFL
//
"""
    (record,) = read_proteins(write("a.dat", text))
    assert record.description.startswith("sp|P15711|104K_THEPA 104 KD MICRONEME-RHOPTRY ANTIGEN OS=THEILERIA PARVA")
    assert parse_header(record.description).taxid is None


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_any_piece_size_reads_the_same(name: str, write: Write, monkeypatch: pytest.MonkeyPatch):
    source = write("a", WRITERS[name](PROTEINS))
    expected = list(read_proteins(source))
    for size in (1, 2, 7, 61, 1000):
        monkeypatch.setattr(uniprot_xml, "READ", size)
        assert list(read_proteins(source)) == expected


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_a_letter_without_an_id_is_reported_at_its_entry(name: str, write: Write):
    text = WRITERS[name]([PROTEINS[1], Protein("Q1", "Q1_X", "a, with b", "Homo sapiens", 9606, "ACJD")])
    encoder = Encoder(strict=False)
    records = list(read_proteins(write("a", text)))
    for record in records:
        encoder.encode(record)
    assert encoder.unknown == {"J": 1}


@pytest.mark.parametrize("name", ["dat", "xml"])
def test_memory_does_not_grow_with_the_file(name: str, write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uniprot_xml, "READ", 1 << 14)

    def peak(copies: int) -> int:
        """Bytes, at most, while ``copies`` times 23 entries are read."""
        body = WRITERS[name](PROTEINS)
        start, end = (0, len(body)) if name == "dat" else (body.index("<entry"), body.index("<copyright"))
        source = write("large", body[:start] + body[start:end] * copies + body[end:])
        tracemalloc.start()
        assert sum(1 for _ in read_proteins(source)) == copies * len(PROTEINS)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(20)  # what is imported and cached for good
    assert peak(240) < peak(40) + 50_000  # 5,520 and 920 entries; Biopython's reader of XML takes 370,000 bytes more
