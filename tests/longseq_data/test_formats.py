"""Names of files, folders and addresses: which format they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq_data.errors import DataError
from longseq_data.ingest.survey import survey
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.formats import HubAddress, Leaf, format_of, leaves
from longseq_data.readers.reading import Reading, agree
from longseq_data.readers.sources import expand_sources


@pytest.fixture
def tree(tmp_path):
    """tree(name, ...): these files, each with a byte; gives the folder."""

    def tree(*names: str) -> Path:
        for name in names:
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        return tmp_path / "tree"

    return tree


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.fasta.gz", "fasta"),
        ("a", "fasta"),
        ("uniref50", "fasta"),
        ("a.txt", "text"),
        ("A.TXT.GZ", "text"),
        ("a.jsonl.gz", "jsonl"),
        ("https://host/a.parquet?download=true", "parquet"),
        ("https://host/fasta?name=a.txt", "fasta"),
        ("hub:a/b", "hub"),
    ],
)
def test_a_name_tells_the_format(name, format):
    assert format_of(name, "auto") == format


def test_a_format_that_is_given_goes_before_the_name():
    assert format_of("a.txt", "lines") == "lines"
    assert format_of("a.data", "jsonl") == "jsonl"


def test_a_folder_is_its_files_sorted_without_hidden_ones(tree):
    folder = tree("b.txt", "a/z.txt.gz", "a/.hidden.txt", ".git/c.txt", "readme", "a/b.TXT")
    expected = [Leaf(str(folder / name), "text") for name in ("b.txt", "a/b.TXT", "a/z.txt.gz")]
    assert leaves(str(folder), "auto") == expected
    assert [leaf.format for leaf in leaves(str(folder), "lines")] == ["lines"] * 3
    assert expand_sources([str(folder)], "auto") == [str(folder)]


def test_a_folder_of_images_is_its_folders(tree):
    folder = tree("n01/a.png", "n01/b.JPEG", "n02/c.jpg", "top.png")
    found = leaves(str(folder), "auto")
    assert found == [Leaf(str(folder / name), "images") for name in ("", "n01", "n02")]


def test_a_folder_of_two_formats_asks_which(tree):
    folder = tree("a.txt", "b.jsonl")
    with pytest.raises(
        DataError, match=r"several formats, a.txt \(text\), b.jsonl \(jsonl\); say which in data.format"
    ):
        expand_sources([str(folder)], "auto")
    assert leaves(str(folder), "jsonl") == [Leaf(str(folder / "b.jsonl"), "jsonl")]


def test_a_folder_without_the_format_is_refused(tree):
    with pytest.raises(DataError, match=r"has no files of data.format=parquet \(\.parquet\)"):
        expand_sources([str(tree("a.txt"))], "parquet")


@pytest.mark.parametrize("names", [("a.fasta",), ("a.fasta", "b.txt"), ("a.bin",)])
def test_a_folder_that_may_be_fasta_is_refused_as_ever(names, tree):
    for format in ("auto", "fasta"):
        with pytest.raises(DataError, match="is a directory; name its files"):
            expand_sources([str(tree(*names))], format)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:deepmind/pg19", ("deepmind/pg19", None, None, "train")),
        ("hub:a/b#validation", ("a/b", None, None, "validation")),
        ("hub:a/b:en@v1.0#test", ("a/b", "en", "v1.0", "test")),
        ("hub:a/b@refs/convert/parquet", ("a/b", None, "refs/convert/parquet", "train")),
    ],
)
def test_an_address_on_the_hub_is_read_and_written(text, parts):
    address = HubAddress.parse(text)
    assert (address.path, address.config, address.revision, address.split) == parts
    assert HubAddress.parse(str(address)) == address
    assert expand_sources([text], "auto") == [str(address)]


@pytest.mark.parametrize("text", ["hub:", "hub:#train", "hub:a/b#train[:10%]", "hub:a/b:", "hub:a@b@c#d#e"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(DataError, match=r"an address on the Hub is hub:OWNER/NAME"):
        expand_sources([text])


def test_a_path_with_format_hub_is_refused(tree):
    with pytest.raises(DataError, match=r"an address on the Hub is hub:OWNER/NAME, with data.format=hub"):
        expand_sources([str(tree("a.txt"))], "hub")


def test_a_local_folder_on_the_hub_becomes_absolute(tree, monkeypatch):
    monkeypatch.chdir(tree("a.txt").parent)
    assert expand_sources(["hub:tree#train", "hub:tree#train"]) == [f"hub:{Path.cwd()}/tree#train"]


def test_files_agree_on_their_tokens():
    assert agree(["a.fasta", "b"], "auto", "auto") == "protein"
    assert agree([], "auto", "auto") == "protein"
    assert agree(["a.txt", "b.jsonl", "hub:c/d"], "auto", "auto") == "bytes"
    assert agree(["a.txt", "b.jsonl"], "auto", "/t.json") == "/t.json"
    assert agree(["b.jsonl", "a.fasta"], "auto", "protein") == "protein"
    with pytest.raises(DataError, match=r"One model cannot read b.txt as bytes, a.fasta as protein"):
        agree(["a.fasta", "b.txt"], "auto", "auto")
    with pytest.raises(
        DataError, match=r"a.fasta: data.format=fasta cannot be read as data.tokenizer=bytes; choose from"
    ):
        agree(["a.fasta"], "auto", "bytes")


@pytest.mark.parametrize(
    ("content", "sequences"),
    [
        (">sp|P1|A a protein\nMKVLAW\nGGH\n", True),
        ("\ufeff\n>r1\r\nacgtn\r\n", True),
        (f">long\n{'ACDEF' * 2000}\n", True),
        ("ID   001R_FRG3G              Reviewed;         256 AA.\n", True),
        ("> a quoted line\nMore\n", False),
        (">quoted\nAn answer of several words.\n", False),
        ("ID   and another word\n", False),
        ("Call me Ishmael.\n>r1\nMKVLAW\n", False),
    ],
)
def test_sequences_in_a_file_that_its_name_makes_text_are_noticed(tmp_path, content, sequences):
    (tmp_path / "a.txt").write_text("Some text.\n")
    path = tmp_path / "b.txt"
    path.write_text(content)
    files = [Leaf(str(tmp_path / "a.txt"), "text"), Leaf(str(path), "text")]
    sentence = Reading("auto", "bytes").mistaken(files)
    assert (sentence is not None and sentence.startswith(f"{path} looks like FASTA")) == sequences
    assert survey(Reading("auto", "bytes"), [leaf.source for leaf in files], strict=False).warning == sentence
    assert Reading("text", "bytes").mistaken(files) is None  # it has been said


def test_prepare_warns_of_fasta_in_a_text_and_names_sources_of_blanks(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(">r1\nMKVLAW\n")
    (tmp_path / "blank.txt").write_text(" \n\n")
    keys = {"workers": 1, "valid_fraction": 0.0, "test_fraction": 0.0}
    prepare(PrepareConfig([str(tmp_path / "a.txt")], str(tmp_path / "corpus"), **keys))
    assert "a.txt looks like FASTA or UniProt's format" in (said := capsys.readouterr().err)
    assert "set format=fasta" in said
    with pytest.raises(DataError, match=r"sources=.*blank\.txt.* hold nothing but white space"):
        prepare(PrepareConfig([str(tmp_path / "blank.txt")], str(tmp_path / "none"), **keys))
