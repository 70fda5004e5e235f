"""Sources cut into blocks: the same rows and errors as by the plain parser."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import ALPHABET, LETTERS, config, made
from longseq_data.errors import DataError
from longseq_data.ingest.parse import parse_lot
from longseq_data.prepare.map_stage import MapTask, Stored, cut, taxid
from longseq_data.prepare.prepare import prepare
from longseq_data.readers import fasta_blocks
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.reading import FASTA
from longseq_data.readers.uniprot import parse_header


def test_refused_letters_are_said_with_their_line(write, tmp_path):
    source = write("a.fasta", ">a\nACD\nEFG\n>b\nAC\nAJC\n")
    with pytest.raises(DataError, match=r"a\.fasta, line 6: character 'J' in record 'b' .* set unknown=x"):
        prepare(config([source], tmp_path / "c", unknown="refuse"))
    assert not (tmp_path / "c").exists()


def task(source: str, folder: Path, block_bytes: int) -> MapTask:
    return MapTask(folder, config([source], folder), FASTA, tuple(FASTA.leaves([source])), None, block_bytes)


def rows_of_blocks(source: str, folder: Path, block_bytes: int) -> list[tuple[str, bytes, int]]:
    """(id, tokens, TaxID) of the records of all blocks, in the order of the source."""
    here, encoder = task(source, folder, block_bytes), FASTA.encoder(strict=False)
    found = []
    for lots in list(cut(here, 0))[:-1]:
        for lot in pickle.loads(pickle.dumps(lots)):
            for records in parse_lot(FASTA, here.leaves[0], lot, encoder, strict=False):
                headers = [header.decode() for header in records.headers]
                names = [name.decode() for name in records.identifiers]
                found += zip(names, records.tokens, map(taxid, headers), strict=True)
    return found


def plain_rows(source: str) -> list[tuple[str, bytes, int]]:
    """The same by the reader of records, letter by letter."""
    found = []
    for record in read_proteins(source):
        letters = [letter if letter in ALPHABET else "X" for letter in record.sequence.upper()]
        known = parse_header(record.description).taxid
        found.append((record.identifier, bytes(map(ALPHABET.index, letters)), -1 if known is None else known))
    return found


def test_a_description_that_looks_like_a_taxid_is_none(write, tmp_path):
    headers = {
        "UniRef50_A binds OX=5 n=1 Tax=Homo sapiens TaxID=9606 RepID=A_HUMAN": 9606,
        "UniRef50_B TaxID=5 like n=1 Tax=Homo sapiens TaxID=9606 RepID=B_HUMAN": 9606,
        "sp|C|C_HUMAN OX=5 TaxID=6 binding OS=Homo sapiens OX=9606 GN=C PE=1 SV=1": 9606,
        "sp|D|D_HUMAN OX=5 binding OS=Homo sapiens PE=1 SV=1": -1,
    }
    source = write("a.fasta", "".join(f">{header}\nACD\n" for header in headers))
    assert [parse_header(header).taxid or -1 for header in headers] == list(headers.values())
    for rows in (plain_rows(source), rows_of_blocks(source, tmp_path, 1 << 20)):
        assert [row[2] for row in rows] == list(headers.values())


ODD_LINES = st.sampled_from(
    [
        *(">a", ">b c", ">", "> x", ">é n=1", ">c TaxID=7 OX=8", ">d OX=-3", ">sp|e|E OX=5 OS=x OX=6 PE=1 SV=2"),
        *("ACD", "acd", "A C", "AJ*", "*", "", " ", ";c", "A>B", "ACDEFGHIK" * 9),
        *("\tAC", "AC\t", "A\x1cC", "\x0bAC", "AC\xa0", "A\x00", "é"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    lines=st.lists(ODD_LINES, max_size=14),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]), min_size=15, max_size=15),
    size=st.integers(1, 80),
)
def test_blocks_are_read_as_records_are(lines, ends, size, tmp_path_factory):
    """The fast road and the plain one give the same rows, or the same error."""
    source = tmp_path_factory.getbasetemp() / "odd.fasta"
    source.write_bytes("".join(f"{line}{end}" for line, end in zip([">first", *lines], ends, strict=False)).encode())

    def outcome(rows) -> tuple[list, str]:
        try:
            return rows(), ""
        except DataError as error:
            return [], str(error)

    plain = outcome(lambda: plain_rows(str(source)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fasta_blocks, "READ_SIZE", size)
        assert outcome(lambda: rows_of_blocks(str(source), source.parent, size)) == plain


def test_a_source_is_cut_at_headers_and_hashed_as_it_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta_blocks, "READ_SIZE", 7)
    source = tmp_path / "a.fasta"
    source.write_bytes(b"\xef\xbb\xbf" + b"".join(b">r%d x\r\nACD\r\nEF\r\n" % i for i in range(50)))
    *pieces, stored = cut(task(str(source), tmp_path, 40), 0)
    assert stored == Stored(source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest(), len(pieces))
    assert len(pieces) > 10
    lots = [lot for block in pieces for lot in block]
    assert b"".join(lot.text for lot in lots) == b"".join(b">r%d x\nACD\nEF\n" % i for i in range(50))
    lines = [lot.text.count(b"\n") for lot in lots]
    assert [lot.line for lot in lots] == [1 + sum(lines[:i]) for i in range(len(lots))]


def test_a_record_that_memory_would_not_hold_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr(fasta_blocks, "LONGEST", 3 << 20)
    monkeypatch.setattr(fasta_blocks, "READ_SIZE", 1 << 18)
    source = write("a.fasta", ">a\n" + "ACDEFGHI\n" * (1 << 19) + ">b\nAC\n")
    with pytest.raises(DataError, match=r"a\.fasta: a record is longer than 3 MiB; check that it is FASTA"):
        rows_of_blocks(source, tmp_path, 1 << 20)


def test_an_error_in_a_far_block_names_its_line(tmp_path, small_parts):
    text = "".join(f">r{i}\nACDEFGHIKL\n" for i in range(20_000))
    source = tmp_path / "far.fasta"
    source.write_text(text + ">z\n\x07\n>y\nAC\n")
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"far\.fasta, line 40002: the control character U\+0007"):
            prepare(config([str(source)], tmp_path / "c", workers=workers))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"ACD\n", "begins neither like FASTA"),
        (gzip.compress(b">a\nACD\n" * 90_000, 0, mtime=0)[:-400_000], "the gzip data ends too early"),
        (b"\x89PNG\x00", "is a binary file"),
    ],
)
def test_a_source_that_cannot_be_read_is_said(content, sentence, write, tmp_path, files):
    bad = write("bad.fasta.gz", content)
    for workers in (1, 2):
        with pytest.raises(DataError) as refused:
            prepare(config([*files, bad], tmp_path / "c", workers=workers))
        assert str(refused.value).startswith(bad)
        assert sentence in str(refused.value)
        assert not (tmp_path / "c").exists()


def test_leading_blank_lines_and_urls_are_read_as_any_file(http_address, write, tmp_path):
    text = "".join(f">r{i} TaxID={i}\n{LETTERS[i % 19 :]}{'A' * i}\n" for i in range(1, 60))
    write("a.fasta", text)
    write("b.fasta", "\n\n" + text)
    local = made([str(tmp_path / "a.fasta")], tmp_path / "c")
    assert made([str(tmp_path / "b.fasta")], tmp_path / "d") == local
    assert made([f"{http_address}/a.fasta"], tmp_path / "e") == local
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["sources"][0]["sha256"] == hashlib.sha256((tmp_path / "b.fasta").read_bytes()).hexdigest()


def test_a_file_that_is_cut_off_is_refused_with_its_last_whole_line(write):
    text = "".join(f">p{i}\n{''.join(random.Random(i).choices(LETTERS, k=50))}\n" for i in range(900))
    stored = gzip.compress(text.encode())
    whole = gzip.decompress(stored).count(b"\n")
    source = write("a.fasta.gz", stored[: len(stored) // 2])
    with pytest.raises(DataError) as refused:
        list(cut(task(source, Path(source).parent, 1 << 20), 0))
    (line,) = re.findall(r"after line (\d+): the gzip data ends too early", str(refused.value))
    assert 0.4 * whole < int(line) < 0.6 * whole
