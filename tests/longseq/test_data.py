"""The data section of a configuration over real files: what tokens they mean, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longseq.cli import main
from longseq.config.loading import load_config
from longseq.data import reading, resolve_sources, split_spec, vocabulary
from longseq.errors import ConfigError
from longseq_data.errors import DataError
from longseq_data.tokenization import load_tokenizer, tokenizer_vocabulary
from longseq_data.vocabulary import BYTES, PIXELS, PROTEIN

TEXT = "".join(f"Line {i} of a short book, number {i * i}.\n" for i in range(300))


@pytest.fixture
def files(folder: Path) -> Path:
    """The folder, with a text, a folder of texts, JSON Lines and images beside the proteins."""
    (folder / "book.txt").write_text(TEXT)
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text(TEXT)
    (folder / "rows.jsonl").write_text(json.dumps({"text": TEXT, "body": "b"}))
    (folder / "pictures").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "pictures" / "a.png")
    return folder


def resolved(*overrides: str):
    config = load_config("small.yaml", overrides)
    resolve_sources(config)
    return config


def test_files_decide_the_tokens(files):
    assert vocabulary(resolved("data.train=proteins.fasta")) == PROTEIN
    for source in ("book.txt", "books", "rows.jsonl", "[book.txt,rows.jsonl,books]"):
        assert vocabulary(resolved(f"data.train={source}")) == BYTES
    pictures = ["data.packing=crop", "data.image_size=4", "data.length=48", "data.batch_tokens=48"]
    config = resolved("data.train=pictures", *pictures)
    assert vocabulary(config) == PIXELS
    assert split_spec(config, "train").reading.image_size == 4


def test_the_spec_has_what_the_keys_say(files):
    spec = split_spec(resolved("data.train=rows.jsonl", "data.column=body", "data.reset=true"), "train")
    assert (spec.reading.column, spec.reset, spec.crop, spec.packing) == ("body", True, "random", "concat")
    config = resolved("data.train=books", "data.crop=first", "data.packing=crop", "data.part_bytes=99")
    spec = split_spec(config, "valid")
    assert (spec.crop, spec.reading.part_bytes, spec.sources) == ("first", 99, (str(files / "books"),))


def test_a_model_is_as_large_as_the_tokens_ask(files, capsys):
    assert main(["data", "tokenizer", "words.json", "book.txt", "--model", "bpe", "--size", "300"]) == 0
    assert "300 tokens (bpe) from 1 documents" in capsys.readouterr().out
    config = resolved("data.train=book.txt", "data.tokenizer=words.json")
    assert config.data.tokenizer == str(files / "words.json")
    assert vocabulary(config).size == 300
    assert config.performer_spec(300).parameter_count - config.performer_spec(260).parameter_count == 2 * 40 * 128


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (
            ["data.train=[book.txt,proteins.fasta]"],
            DataError,
            "One model cannot read .* as bytes, .* as protein",
        ),
        (["data.train=book.txt", "data.ood=proteins.fasta"], DataError, "One model cannot read"),
        (["data.train=proteins.fasta", "data.tokenizer=bytes"], DataError, "cannot be read as data.tokenizer=bytes"),
        (["data.train=book.txt", "data.tokenizer=pixels"], DataError, "cannot be read as data.tokenizer=pixels"),
        (["data.train=pictures"], ConfigError, "data.packing=concat with pixels"),
        (["data.train=book.txt", "data.column=body"], ConfigError, "data.column=body: none of the files is a table"),
        (["data.train=."], DataError, "is a directory"),
        (["data.train=pictures", "data.format=text"], DataError, "has no files of data.format=text"),
    ],
)
def test_files_that_do_not_go_together_are_refused(files, overrides, error, sentence):
    with pytest.raises(error, match=sentence):
        resolved(*overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.train=book.txt", "data.tokenizer=none.json"], "none.json: no such tokenizer file"),
        (["data.train=rows.jsonl", "data.column=title"], "there is no 'title' (data.column) among text, body"),
        (["data.train=bad.jsonl"], "bad.jsonl, line 2: this is no JSON"),
        (["data.train=blank.txt"], "blank.txt: nothing but white space"),
        (["data.train=hub:nothing/here"], "hub:nothing/here#train: cannot be opened"),
        (
            ["data.train=broken", "data.packing=crop", "data.length=48", "data.batch_tokens=48", "data.image_size=4"],
            "broken.png: cannot be read as an image",
        ),
    ],
)
def test_bad_text_and_images_are_refused_before_anything_is_made(files, capsys, monkeypatch, overrides, sentence):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (files / "bad.jsonl").write_text('{"text": "a"}\nnonsense\n')
    (files / "blank.txt").write_text("\n\n")
    (files / "broken").mkdir()
    (files / "broken" / "broken.png").write_bytes(b"no image")
    before = sorted(files.rglob("*"))
    assert main(["fit", "small.yaml", *overrides]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("longseq: error: ")
    assert sentence in last
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_data_tokenizer_trains_on_any_texts_and_writes_one_file(files, capsys, model):
    sources = ["book.txt", "books", "rows.jsonl"]
    assert main(["data", "tokenizer", "out/t.json", *sources, "--model", model, "--size", "320"]) == 0
    said = capsys.readouterr().out
    assert f"320 tokens ({model}) from 3 documents, {3 * len(TEXT):,} bytes" in said
    assert [path.name for path in (files / "out").iterdir()] == ["t.json"]
    tokenizer = load_tokenizer(str(files / "out" / "t.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT)
    assert tokenizer_vocabulary(str(files / "out" / "t.json")).size == 320


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["t.json", "book.txt", "--size", "260"], "256 bytes and 4 special tokens leave no room; take 261 or more"),
        (["t.json", "proteins.fasta"], "taken for fasta, and a tokenizer learns from text"),
        (["t.json", "none.txt"], "none.txt does not exist"),
        (["t.model", "book.txt"], "a tokenizer's file ends in .json"),
        (["old.json", "book.txt"], "old.json exists already"),
        (["t.json", "rows.jsonl", "--column", "txt"], "there is no 'txt'"),
        (["t.json", "book.txt", "--megabytes", "0"], "--megabytes 0: take 1 or more"),
        (["proteins.fasta/t.json", "book.txt"], "cannot be written"),
    ],
)
def test_data_tokenizer_refuses_in_one_sentence(files, capsys, arguments, sentence):
    (files / "old.json").write_text("{}")
    before = sorted(files.rglob("*"))
    assert main(["data", "tokenizer", *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("longseq: error: ")
    assert sentence in last
    assert sorted(files.rglob("*")) == before


def test_too_little_text_for_a_tokenizer_is_a_warning(files, capsys):
    assert main(["data", "tokenizer", "t.json", "book.txt", "--model", "bpe", "--size", "5000"]) == 0
    assert "longseq: warning: these texts give no more than" in capsys.readouterr().err


def test_reading_says_the_same_for_a_resolved_configuration(files):
    config = resolved("data.train=books", "data.format=lines")
    assert reading(config) == reading(config)
    assert reading(config).format == "lines"
