"""Every format prepared: the records, splits and measures of streaming the same files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from corpora import config, data_files, tables
from every_format import every_format, modes
from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.ingest.block import stored_dtype
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.inspection import corpus_lines
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.verify import verify
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.rank_share import Share
from longseq_data.samples.shuffling import documents_in_file_order
from longseq_data.samples.streaming import StreamSpec
from longseq_data.tokenization import load_tokenizer

SHARES = {"valid_fraction": 0.2, "test_fraction": 0.1}


def keys(spec: StreamSpec, place: Path, **changes: object) -> PrepareConfig:
    """A preparation of what a stream reads, with its splits."""
    read = spec.reading
    said = {"format": read.format, "tokenizer": read.tokens, "column": read.column}
    said |= {"part_bytes": read.part_bytes, "image_size": read.image_size, "deduplicate": False}
    return config(list(spec.sources), place, **{**said, **SHARES, **changes})


@every_format
def test_records_and_splits_are_those_of_the_stream(format, make, tmp_path):
    spec = make(format)
    manifest, new = prepare(keys(spec, tmp_path / "c"))
    assert new
    stored = stored_dtype(spec.vocabulary)
    for split, table in tables(tmp_path / "c").items():
        streamed = replace(spec, split=split)
        expected = {d.identifier: spec.encoder.encode(d).tolist() for d in documents_in_file_order(streamed)}
        assert dict(zip(table["id"].to_pylist(), table["tokens"].to_pylist(), strict=True)) == expected
        assert table.schema.field("tokens").type.value_type == str(stored)
    assert verify(tmp_path / "c", full=True).records == sum(info.records for info in manifest.splits.values())
    assert replace(manifest.vocabulary, name="") == replace(spec.vocabulary, name="")
    assert any("records" in line for line in corpus_lines(tmp_path / "c", 2))
    assert not prepare(keys(spec, tmp_path / "c"))[1]  # it is there already


@every_format
def test_targets_stand_for_as_many_bytes_and_words_as_while_streaming(format, make, tmp_path):
    prepare(keys(make(format), tmp_path / "c"))
    for mode in modes(format):
        spec = make(format, split="train", **SHARES, **mode)
        ways = {"crop": spec.crop, "reset": spec.reset}
        prepared = CorpusSpec(str(tmp_path / "c"), "train", 11, spec.packing, "causal", 5, **ways)
        assert measured(prepared) == measured(spec)
        assert prepared.target_counts().tolist() == spec.target_counts().tolist()


def measured(spec) -> tuple[int, int, int]:
    """(targets, bytes, words) of an evaluation."""
    found = [0, 0, 0]
    for make_batch in spec.measuring().evaluation(Share(3, 1, 0, 1)):
        batch = make_batch()
        here = (batch["targets"] >= 0).sum(), batch["bytes"], batch["words"]
        found = [before + int(more) for before, more in zip(found, here, strict=True)]
    return tuple(found)


@pytest.mark.parametrize("format", ["jsonl", "tokens", "folder", "images"])
def test_bytes_do_not_depend_on_the_workers(format, make, tmp_path, small_parts):
    spec = make(format)
    for workers in (1, 2):
        prepare(keys(spec, tmp_path / f"c{workers}", workers=workers))
    assert data_files(tmp_path / "c1") == data_files(tmp_path / "c2")
    assert read_manifest(tmp_path / "c1").sources == read_manifest(tmp_path / "c2").sources


def test_a_corpus_has_its_tokenizer_with_it_wherever_it_lies(make, tmp_path, trained):
    first, _ = prepare(keys(make("tokens"), tmp_path / "c"))
    shutil.move(tmp_path / "c", tmp_path / "moved")
    Path(trained["tokens"]).rename(tmp_path / "gone.json")
    try:
        moved = read_manifest(tmp_path / "moved")
        assert moved.fingerprint == first.fingerprint
        corpus = Corpus.open(tmp_path / "moved", "train")
        text = tables(tmp_path / "moved")["train"]["text"][0].as_py()
        assert load_tokenizer(corpus.vocabulary.name).decode(corpus.record(0).tokens.tolist()) == text.decode()
        verify(tmp_path / "moved", full=True)
    finally:
        (tmp_path / "gone.json").rename(trained["tokens"])


def test_texts_without_duplicates_and_filtered_by_length(tmp_path):
    rows = [{"id": f"r{i:02d}", "text": "ab" * (i % 7)} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"min_length": 4, "max_length": 10, "valid_fraction": 0, "test_fraction": 0}
    manifest, _ = prepare(config([str(tmp_path / "a.jsonl")], tmp_path / "c", **settings))
    columns = (tables(tmp_path / "c")["train"][name].to_pylist() for name in ("id", "tokens"))
    found = {name: bytes(tokens) for name, tokens in zip(*columns, strict=True)}
    assert found == {f"r{i:02d}": b"ab" * i for i in (2, 3, 4, 5)}
    assert manifest.report["filtered"] == {"too long": 4, "too short": 5}
    assert manifest.report["duplicates"] == 16 - 4
    assert "nucleotides" not in manifest.report


def test_of_equal_tokens_the_same_text_is_kept_however_blocks_are_cut(tmp_path, monkeypatch, trained):
    """A tokenizer may read several texts as the same tokens."""
    tokenizer = json.loads(Path(trained["tokens"]).read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower.json").write_text(json.dumps(tokenizer))
    rows = [{"id": "same", "text": text} for text in ("Ab c", "aB c", "ab C", "AB c")]
    corpora = []
    for number, order in enumerate((rows, rows[::-1])):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, order)))
        settings = {"tokenizer": str(tmp_path / "lower.json"), "valid_fraction": 0, "test_fraction": 0}
        prepare(config([str(tmp_path / f"{number}.jsonl")], tmp_path / f"c{number}", **settings))
        corpora.append(data_files(tmp_path / f"c{number}"))
    assert corpora[0] == corpora[1]
    assert tables(tmp_path / "c0")["train"]["text"].to_pylist() == [b"AB c"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"unknown": "drop"}, "unknown=drop counts letters outside an alphabet, and bytes have none"),
        ({"split_by": "cluster"}, "clusters=mmseqs is for proteins, and these are bytes"),
        ({"tokenizer": "dna", "format": "text"}, "cannot be read as tokenizer=dna"),
        ({"column": "body", "format": "jsonl"}, "there is no 'body' (column) among text"),
        ({"unknown": "refuse", "tokenizer": None}, "byte 0xff is not UTF-8; convert the file, or set unknown=x"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_keys_of_prepare(changes, sentence, tmp_path, trained):
    (tmp_path / "a.txt").write_bytes(b'{"text": "a"}\n' if "column" in changes else b"some text \xff\n")
    if changes.get("tokenizer", "") is None:
        changes = {**changes, "tokenizer": trained["tokens"]}
    with pytest.raises(DataError) as refused:
        prepare(config([str(tmp_path / "a.txt")], tmp_path / "c", **changes))
    assert sentence in str(refused.value)
    assert "data." not in str(refused.value)


def test_dna_is_prepared_as_dna(write, tmp_path):
    source = write("a.fasta", ">a\nACGTUacgtnR\n>b\nACGT\n")
    settings = {"tokenizer": "dna", "valid_fraction": 0, "test_fraction": 0, "unknown": "drop", "max_unknown": 0.15}
    manifest, _ = prepare(config([source], tmp_path / "c", **settings))
    (row,) = tables(tmp_path / "c")["train"]["tokens"].to_pylist()
    assert row == [0, 1, 2, 3]
    assert manifest.report["filtered"] == {"too many unknown letters": 1}
    assert manifest.report["unknown_letters"] == {"R": 1}
    assert np.array_equal(Corpus.open(tmp_path / "c", "train").record(0).tokens, row)
