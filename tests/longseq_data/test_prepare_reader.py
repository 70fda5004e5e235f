"""Sources cut into blocks: the same rows and errors as by the plain road."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import LETTERS, config, made
from longseq_data.errors import DataError
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.reader import ProteinReader, Stored, cut
from longseq_data.readers.uniprot import parse_header


def test_refused_letters_are_said_with_their_line(write, tmp_path):
    source = write("a.fasta", ">a\nACD\nEFG\n>b\nAC\nAJC\n")
    with pytest.raises(DataError, match=r"a\.fasta, line 6: character 'J' in record 'b' .* set unknown=x"):
        prepare(config([source], tmp_path / "c", unknown="refuse"))
    assert not (tmp_path / "c").exists()


def test_a_description_that_looks_like_a_taxid_is_none(write):
    headers = {
        "UniRef50_A binds OX=5 n=1 Tax=Homo sapiens TaxID=9606 RepID=A_HUMAN": 9606,
        "UniRef50_B TaxID=5 like n=1 Tax=Homo sapiens TaxID=9606 RepID=B_HUMAN": 9606,
        "sp|C|C_HUMAN OX=5 TaxID=6 binding OS=Homo sapiens OX=9606 GN=C PE=1 SV=1": 9606,
        "sp|D|D_HUMAN OX=5 binding OS=Homo sapiens PE=1 SV=1": -1,
    }
    source = write("a.fasta", "".join(f">{header}\nACD\n" for header in headers))
    assert [parse_header(header).taxid or -1 for header in headers] == list(headers.values())
    for rows in (ProteinReader().whole(source), *map(ProteinReader().block, cut(source, 1 << 20, Stored()))):
        assert [row.taxid for row in rows] == list(headers.values())


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
        got = []
        try:
            got += rows
        except DataError as error:
            return [], str(error)
        return got, ""

    plain = outcome(ProteinReader().whole(str(source)))
    blocks = outcome(row for block in cut(str(source), size, Stored()) for row in ProteinReader().block(block))
    assert blocks == plain


def test_a_block_that_begins_inside_a_read_is_cut_at_a_header(tmp_path, monkeypatch):
    from longseq_data.prepare import reader as prepare_reader

    monkeypatch.setattr(prepare_reader, "READ_SIZE", 7)
    source = tmp_path / "a.fasta"
    source.write_bytes(b"\xef\xbb\xbf" + b"".join(b">r%d x\r\nACD\r\nEF\r\n" % i for i in range(50)))
    stored = Stored()
    blocks = list(cut(str(source), 40, stored))
    assert len(blocks) == stored.blocks > 10
    assert stored.size == source.stat().st_size
    assert stored.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert b"".join(block.text for block in blocks) == b"".join(b">r%d x\nACD\nEF\n" % i for i in range(50))
    lines = [block.text.count(b"\n") for block in blocks]
    assert [block.first_line for block in blocks] == [1 + sum(lines[:i]) for i in range(len(blocks))]


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
        list(cut(source, 1 << 20, Stored()))
    (line,) = re.findall(r"after line (\d+): the gzip data ends too early", str(refused.value))
    assert 0.4 * whole < int(line) < 0.6 * whole
