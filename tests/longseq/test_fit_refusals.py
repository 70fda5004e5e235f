"""``longseq fit`` with input that cannot be trained on: refused in one sentence before any process is started."""

from __future__ import annotations

import gzip
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from longseq.cli import main
from longseq.config.loading import load_config
from longseq.data import resolve_sources
from longseq.data_report import check_data
from longseq.errors import LongseqError
from longseq.launch.before import check_disk

LONG = "".join(f">r{i}\n{'ACDEFGHIKL' * 20}\n" for i in range(500)).encode()


@pytest.fixture
def refusal(folder: Path, capsys: pytest.CaptureFixture[str]):
    """refusal(override, ...): the sentence that refuses it, once nothing is found to be left of the attempt."""

    def refusal(*overrides: str) -> str:
        before = sorted(folder.rglob("*"))
        assert main(["fit", "small.yaml", *overrides]) == 1
        *_, last = capsys.readouterr().err.splitlines()
        assert sorted(folder.rglob("*")) == before
        assert last.startswith("longseq: error: ")
        return last.removeprefix("longseq: error: ")

    return refusal


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.fasta", b"", "is empty"),
        ("blank.fasta", b"\n\n", "line 2: nothing but blank lines"),
        ("cut.fasta.gz", gzip.compress(LONG, mtime=0)[:-900], "the gzip data ends too early"),
        ("damaged.fasta.gz", gzip.compress(LONG, mtime=0)[:50] + bytes(200), "the gzip data"),
        ("headless.fasta", b"MKVLA\n", "line 1: begins neither like FASTA"),
        ("nameless.fasta", b">a\nMKV\n>\nMKV\n", "line 3: the header has no identifier"),
        ("hollow.fasta", b">a\nMKV\n>b\n>c\nMKV\n", "line 3: record 'b' has no residues"),
        ("binary.fasta", b">a\n\x00\x01", "is a binary file"),
    ],
)
def test_a_file_that_is_no_fasta_is_refused_with_file_and_line(refusal, folder, name, content, sentence):
    (folder / name).write_bytes(content)
    refused = refusal(f"data.train={name}")
    assert refused.startswith(str(folder / name))
    assert sentence in refused


@pytest.mark.parametrize("split", ["valid", "test", "ood"])
def test_a_bad_file_of_any_split_is_refused_before_training(refusal, folder, split):
    (folder / "empty.fasta").touch()
    assert "empty.fasta is empty" in refusal("data.train=proteins.fasta", f"data.{split}=empty.fasta")


def test_the_second_of_two_files_is_checked_too(refusal):
    assert "missing.fasta does not exist" in refusal("data.train=[proteins.fasta,missing.fasta]")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.fasta", "missing.fasta does not exist"),
        ("none*.fasta", "No file matches none*.fasta"),
        ("*.xyz", "No file matches *.xyz"),
        (".", "is a directory"),
        ("nothing://host/a.fasta", "unknown kind of URL"),
    ],
)
def test_a_source_that_names_no_file_is_refused(refusal, source, sentence):
    assert sentence in refusal(f"data.train={source}")


def test_a_url_that_does_not_answer_is_refused(refusal):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/a.fasta"
        refused = refusal(f"data.train={address}")
    assert refused.startswith(address)
    assert "check the address and the connection" in refused


def test_letters_outside_the_alphabet_are_refused_when_strict(refusal, folder):
    (folder / "odd.fasta").write_text(">a\nMKV\nMK1\n")
    refused = refusal("data.train=odd.fasta", "data.strict=true")
    assert refused.startswith(f"{folder}/odd.fasta, line 3: character '1' in record 'a'")
    assert "data.strict=false" in refused


def test_letters_outside_the_alphabet_are_counted_in_a_warning(folder, capsys):
    (folder / "odd.fasta").write_text(">a\nMKV\n>b\nMJ1J\n")
    config = load_config("small.yaml", ["data.train=odd.fasta", "trainer.valid_every=0"])
    resolve_sources(config)
    check_data(config)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longseq: warning: ")]
    assert len(warnings) == 1
    assert "read as X: 'J' × 2, '1' × 1" in warnings[0]
    assert f"the first in {folder}/odd.fasta, line 3: 'J' in record 'b'. Refuse" in warnings[0]
    assert "data.strict=true" in warnings[0]


def test_a_world_that_does_not_divide_the_step_is_refused(refusal):
    refused = refusal("data.train=proteins.fasta", "trainer.devices=3")
    assert all(words in refused for words in ("4 sequences", "3 processes (trainer.devices)", "data.batch_tokens=96"))


def test_an_unknown_key_is_refused(refusal):
    assert "unknown key 'trainer.device'. Did you mean trainer.devices" in refusal("trainer.device=2")


def test_an_existing_run_is_neither_touched_nor_repeated(refusal, run):
    refused = refusal("data.train=proteins.fasta", f"run.name={run.path.name}")
    assert refused.startswith(f"{run.path}: a run of this name exists")
    assert run.resume_command in refused


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-x", "ü", "a" * 101])
def test_a_name_that_makes_no_good_folder_is_refused(refusal, name):
    assert refusal("data.train=proteins.fasta", f"run.name={name}").startswith("run.name=")


def test_a_file_in_the_place_of_the_run_folder_is_refused(refusal):
    refused = refusal("data.train=proteins.fasta", "run.dir=proteins.fasta")
    assert refused.startswith("run.dir=proteins.fasta: a file, not a folder")
    assert "proteins.fasta/deeper" in refusal("data.train=proteins.fasta", "run.dir=proteins.fasta/deeper")


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    refused = refusal("data.train=proteins.fasta")
    assert "10 MiB free" in refused
    assert "trainer.keep_checkpoints=3" in refused
    assert "run.dir" in refused


def test_a_resumed_run_needs_room_only_for_what_it_has_not_written(config, run, publish, monkeypatch):
    one = config.performer_spec(29).parameter_count * 4 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5 * one))
    with pytest.raises(LongseqError, match="4 more checkpoints"):
        check_disk(config, run.path)
    for step in (1, 2, 3):
        publish(step)
    check_disk(config, run.path)


def test_an_empty_split_is_refused_before_anything_is_made(refusal, folder):
    (folder / "two.fasta").write_text(">a\nMKV\n>b\nMJ\n")
    refused = refusal("data.train=two.fasta", "trainer.valid_every=5")
    assert refused.startswith("data.train: the hash of the sequences puts none of the 2 records into validation")
    assert "trainer.valid_every=0" in refused


def test_an_order_that_needs_the_cache_is_refused_without_it(refusal):
    refused = refusal("data.train=proteins.fasta", "data.later_epochs=permutation", "data.cache=none")
    assert refused.startswith("data.later_epochs=permutation needs the blocks of data.cache, and data.cache=none ")
