"""No file loses its training or its validation split without a sentence that says why, and what would do."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from longseq.cli import main
from longseq.commands.data.inspect import add_arguments
from longseq.commands.data.inspect import run as inspect
from longseq.config.loading import load_config
from longseq.config.sections import DataConfig
from longseq.data import identities, resolve_sources, split_spec
from longseq.data_report import check_data
from longseq.errors import RunError
from longseq.runs.changes import FIXED, refuse_changes
from longseq.runs.run import Run
from longseq.text_parts import fit_parts
from longseq_data.errors import DataError
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.inspection import report_lines
from longseq_data.prepare.prepare import prepare
from longseq_data.samples.shuffling import documents_in_file_order
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import decode


def checked(*overrides: str) -> object:
    config = load_config("small.yaml", list(overrides))
    resolve_sources(config)
    fit_parts(config)
    check_data(config)
    return config


def splits_of(config) -> dict[str, list[str]]:
    found = {}
    for split in ("train", "valid", "test"):
        spec = split_spec(config, split)
        assert isinstance(spec, StreamSpec)
        found[split] = [document.identifier for document in documents_in_file_order(spec)]
    return found


def sequence(number: int) -> str:
    """A protein that no other number has."""
    return "MKV" + "".join("ACDEFGHIKL"[int(digit)] for digit in f"{number:05d}")


def place(number: int) -> float:
    """Where it stands, by the definition, in words of its own."""
    tokens = bytes("ACDEFGHIKLMNPQRSTVWYBOUXZ".index(letter) for letter in sequence(number))
    return (int.from_bytes(hashlib.blake2b(tokens, digest_size=16).digest()[8:], "big") // 2**11) / 2**53


def test_naming_the_share_that_null_means_is_no_change(folder: Path) -> None:
    run = Run.create(checked("data.train=proteins.fasta", "model.objective=fim"), "one")
    refuse_changes(run.config(), run.config(("data.fim_rate=0.5",)), run, FIXED)
    with pytest.raises(RunError, match=r"data\.fim_rate=0\.4: .* was started with 0\.5, and keeps it"):
        refuse_changes(run.config(), run.config(("data.fim_rate=0.4",)), run, FIXED)


@pytest.mark.parametrize("header", [">seq {}", "> protein {}"])
def test_records_of_one_identifier_are_split_by_their_sequences_and_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], header: str
) -> None:
    (folder / "same.fasta").write_text("".join(f"{header.format(i)}\n{sequence(i)}\n" for i in range(400)))
    name = header.split()[0].lstrip(">") or header.split()[1]
    config = checked("data.train=same.fasta")
    said = capsys.readouterr().err
    assert f"399 of 400 records have an identifier that came before (the first: '{name}')" in said
    found = {}
    for split in ("train", "valid", "test"):
        documents = documents_in_file_order(split_spec(config, split))  # type: ignore[arg-type]
        found[split] = [decode(document.encode(0, None)) for document in documents]
    places = {sequence(i): place(i) for i in range(400)}
    assert found["valid"] == [letters for letters, at in places.items() if at < 0.05]
    assert found["test"] == [letters for letters, at in places.items() if 0.05 <= at < 0.1]
    assert found["train"] == [letters for letters, at in places.items() if at >= 0.1]
    assert all(found.values())


def test_a_sequence_stays_in_its_split_whatever_it_is_called_and_however_it_is_written(folder: Path) -> None:
    (folder / "a.fasta").write_text("".join(f">seq {i}\n{sequence(i)}\n" for i in range(400)))
    entry = ">sp|P{0:05d}|X a protein\n{1}\n{2}*\n"
    text = "".join(entry.format(i, sequence(i)[:4].lower(), sequence(i)[4:]) for i in reversed(range(400)))
    (folder / "b.fasta").write_text(text)
    table = "".join(json.dumps({"id": "same", "seq": sequence(i)}) + "\n" for i in range(400))
    (folder / "c.jsonl").write_text(table)
    keys = {"a.fasta": [], "b.fasta": [], "c.jsonl": ["data.tokenizer=protein", "data.column=seq"]}
    found = {}
    for name, more in keys.items():
        config = checked(f"data.train={name}", *more)
        documents = documents_in_file_order(split_spec(config, "valid"))  # type: ignore[arg-type]
        found[name] = {decode(document.encode(0, None)) for document in documents}
    assert found["a.fasta"] == {sequence(i) for i in range(400) if place(i) < 0.05}
    assert found["b.fasta"] == found["a.fasta"]
    assert found["c.jsonl"] == found["a.fasta"]


def test_a_run_of_the_version_before_keeps_its_splits(folder: Path) -> None:
    (folder / "few.fasta").write_text("".join(f">r{i}\n{sequence(i)}\n" for i in range(400)))
    config = checked("data.train=few.fasta")
    run = Run.create(config, "one")
    assert run.config().data.split_by == "sequence"
    lines = run.config_path.read_text().splitlines(keepends=True)
    run.config_path.write_text("".join(line for line in lines if "split_by" not in line))  # as it was written before
    before = run.config()
    assert before.data.split_by == "id"
    found = splits_of(before)
    for name in found["valid"]:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        assert (int.from_bytes(digest, "big") // 2**11) / 2**53 < 0.05
    assert found["valid"] != splits_of(config)["valid"]
    with pytest.raises(RunError, match=r"data\.split_by"):
        refuse_changes(before, run.config(("data.split_by=sequence",)), run, FIXED)
    assert sorted(name for names in found.values() for name in names) == sorted(f"r{i}" for i in range(400))


@pytest.mark.parametrize("header", [">seq {}", "> protein {}"])
def test_records_of_one_identifier_are_refused_by_id_and_the_advice_works(folder: Path, header: str) -> None:
    (folder / "same.fasta").write_text("".join(f"{header.format(i)}\nMKVLAACDEF\n" for i in range(80)))
    name = header.split()[0].lstrip(">") or header.split()[1]
    with pytest.raises(DataError, match=f"all of them have the identifier '{name}'") as caught:
        checked("data.train=same.fasta", "data.split_by=id")
    program = re.search(r"awk '(.*)' OLD > NEW", str(caught.value))
    assert program
    assert program[1] == '/^>/{print ">r" ++n " " substr($0, 2); next} 1'
    lines = (folder / "same.fasta").read_text().splitlines()
    heads = iter(range(1, 81))
    new = [f">r{next(heads)} {line[1:]}" if line.startswith(">") else line for line in lines]  # as awk does
    (folder / "new.fasta").write_text("\n".join(new) + "\n")
    assert all(splits_of(checked("data.train=new.fasta", "data.split_by=id")).values())


@pytest.mark.parametrize("header", [">seq {}", "> protein {}"])
def test_prepare_refuses_records_of_one_identifier_by_id(folder: Path, header: str) -> None:
    (folder / "same.fasta").write_text("".join(f"{header.format(i)}\n{'MKVLAACDEF' * (i + 1)}\n" for i in range(80)))
    with pytest.raises(DataError, match=r"80 records into .* all of them have the identifier"):
        prepare(PrepareConfig(sources=["same.fasta"], output="corpus", workers=1, split_by="id"))
    assert not (folder / "corpus").exists()
    manifest, _ = prepare(PrepareConfig(sources=["same.fasta"], output="other", workers=1))
    assert manifest.splits["valid"].records
    again = {"records": 80, "again": 79, "first": header.split()[0].lstrip(">") or header.split()[1]}
    assert manifest.report["repeated_ids"] == again
    assert any("a hash of the sequences decides the splits" in line for line in report_lines("other", manifest))


@pytest.mark.parametrize("records", [2, 3, 8])
def test_the_fraction_that_is_advised_fills_the_split(folder: Path, records: int) -> None:
    (folder / "few.fasta").write_text("".join(f">r{i}\n{sequence(5 + i)}\n" for i in range(records)))
    with pytest.raises(DataError, match="into validation") as caught:
        checked("data.train=few.fasta")
    advised = re.search(r"set (data.valid_fraction=[\d.]+)(?: and (data.test_fraction=[\d.]+))?", str(caught.value))
    assert advised
    config = checked("data.train=few.fasta", *filter(None, advised.groups()))
    for split in ("train", "valid"):
        assert list(documents_in_file_order(split_spec(config, split)))  # type: ignore[arg-type]


def rows(kind: str, names: list[str]) -> str:
    """A source of so many records of 30 letters, each with its name; a name of pictures and texts is that of a file."""
    if kind == "jsonl":
        Path("d.jsonl").write_text("".join(json.dumps({"id": name, "text": "abc" * 10}) + "\n" for name in names))
        return "d.jsonl"
    if kind == "parquet":
        table = pa.table({"id": names, "text": ["abc" * 10] * len(names)})
        pq.write_table(table, "d.parquet", row_group_size=3)
        return "d.parquet"
    Path("d").mkdir()
    for number, name in enumerate(names):
        if kind == "text":
            Path("d", name).write_text("abc" * 10)
        else:
            Image.new("RGB", (4, 4), (number, 2, 3)).save(f"d/{name}")
    return "d"


def of_kind(kind: str, count: int) -> list[str]:
    return [f"r{i}{ {'text': '.txt', 'images': '.png'}.get(kind, '') }" for i in range(count)]


KINDS = ["jsonl", "parquet", "images"]
SMALL = ["data.image_size=4", "data.packing=crop"]


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_every_format_are_where_their_identifiers_put_them(folder: Path, kind: str) -> None:
    names = of_kind(kind, 90)
    more = SMALL if kind == "images" else []
    found = splits_of(checked(f"data.train={rows(kind, names)}", *more, "data.valid_fraction=0.2"))
    names = [f"d/{name}" for name in names] if kind == "images" else names  # with its folder, a class
    place = {}
    for name in names:  # by the definition, in words of its own
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        place[name] = (int.from_bytes(digest, "big") // 2**11) / 2**53
    assert sorted(found["valid"]) == sorted(name for name in names if place[name] < 0.2)
    test = DataConfig().test_fraction
    assert sorted(found["test"]) == sorted(name for name in names if 0.2 <= place[name] < 0.2 + test)
    assert sorted(found["train"]) == sorted(name for name in names if place[name] >= 0.2 + test)
    assert found["train"]
    assert found["valid"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_records_of_any_format_is_refused_and_the_advice_works(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    more = SMALL if kind == "images" else []
    source = rows(kind, of_kind(kind, 3))
    before = sorted(folder.rglob("*"))
    assert main(["fit", "small.yaml", f"data.train={source}", *more]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(
        "longseq: error: data.train: the hash of the identifiers puts none of the 3 records into validation with "
        "data.valid_fraction="
    )
    assert sorted(folder.rglob("*")) == before
    advised = re.search(r"set (data.valid_fraction=[\d.]+)(?: and (data.test_fraction=[\d.]+))?", last)
    assert advised
    config = checked(f"data.train={source}", *more, *filter(None, advised.groups()))
    for split in ("train", "valid"):
        assert list(documents_in_file_order(split_spec(config, split)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_one_identifier_are_refused_in_every_table(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert main(["fit", "small.yaml", f"data.train={rows(kind, ['same'] * 40)}"]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert "none of the 40 records into validation" in last
    assert "all of them have the identifier 'same'" in last


def test_one_record_is_not_asked_to_be_split(folder: Path) -> None:
    (folder / "one.fasta").write_text(">r0\nMKVLAACDEF\n")
    with pytest.raises(DataError, match=r"one record .'r0'. cannot be both trained on and held out"):
        checked("data.train=one.fasta")


def test_a_single_text_is_held_out_of_in_smaller_parts(folder: Path, capsys) -> None:
    text = "".join(f"line {i} of a book that has a good many lines\n" for i in range(20_000))
    (folder / "book.txt").write_text(text)
    config = checked("data.train=book.txt")
    assert f"read in parts of data.part_bytes={config.data.part_bytes}" in capsys.readouterr().err
    parts = {}
    for split in ("train", "valid", "test"):
        documents = list(documents_in_file_order(split_spec(config, split)))
        assert documents
        parts[split] = sum(document.length for document in documents)
        parts |= {document.identifier: document.tokens.tobytes() for document in documents}
    pieces = sorted((key for key in parts if key.startswith("book")), key=lambda key: int(key.partition("#")[2] or 0))
    assert b"".join(parts[key] for key in pieces) == text.encode()
    assert 0 < parts["valid"] < 0.1 * len(text)
    assert 0 < parts["test"] < 0.1 * len(text)


def test_texts_that_fill_their_splits_keep_their_parts(folder: Path) -> None:
    for i in range(60):
        (folder / f"t{i}.txt").write_text(f"text number {i}\n")
    assert checked("data.train=t*.txt").data.part_bytes == 1_048_576


def test_a_moved_file_is_accepted_and_a_changed_one_is_not(folder: Path) -> None:
    config = checked("data.train=proteins.fasta")
    run = Run.create(config, "one")
    run.record_data(identities(config))
    for name in ("same", "other"):
        (folder / name).mkdir()
        shutil.copy("proteins.fasta", folder / name)
    with (folder / "other" / "proteins.fasta").open("r+b") as file:
        file.seek(50)
        file.write(b"W")
    before = run.config()
    after = run.config(("data.train=same/proteins.fasta",))
    resolve_sources(after)
    refuse_changes(before, after, run, FIXED)
    run.check_data(after, identities(after))
    changed = run.config(("data.train=other/proteins.fasta",))
    resolve_sources(changed)
    with pytest.raises(RunError, match=r"data.train=.*other/proteins.fasta.*, whose content is another"):
        refuse_changes(before, changed, run, FIXED)


def test_inspect_looks_at_text_and_tables(folder: Path, capsys) -> None:
    import argparse

    (folder / "book.txt").write_text("Call me\nIshmael.\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": "x" * i, "id": i}) + "\n" for i in (3, 5)))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, head, first in (
        ("book.txt", "1 file: 1 records, 17 bytes of text", "  book.txt  17  Call me Ishmael."),
        ("rows.jsonl", "1 file: 2 records, 8 bytes of text", "  3  3  xxx"),
    ):
        assert inspect(parser.parse_args([name])) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == head
        assert first in lines
