"""A prepared corpus, read back: every view against a plain array, and every kind of damage found."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import flat_and_stream, tables, write_files
from longseq_data.corpus.corpus import Corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.errors import DataError
from longseq_data.files import sha256_of
from longseq_data.prepare import reduce_stage
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.verify import verify
from longseq_data.splits import split_of
from longseq_data.vocabulary import EOS, PAD, PROTEIN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several shards, each of several record batches."""
    base = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reduce_stage, "SHARD_BYTES", 100_000)
        patched.setattr(reduce_stage, "BATCH_TOKENS", 9_000)
        patched.setattr(reduce_stage, "BATCH_ROWS", 70)
        sources = write_files(base / "files", records=4000)
        prepare(PrepareConfig(sources=sources, output=str(base / "c"), workers=1, ood_taxids=[10239]))
    return base / "c"


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return Corpus.open(folder, "train")


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return flat_and_stream(tables(folder)["train"], EOS)


def test_a_split_opens_with_what_its_manifest_says(folder, corpus):
    table = tables(folder)["train"]
    manifest = read_manifest(folder)
    assert len(corpus) == table.num_rows == manifest.splits["train"].records
    assert corpus.vocabulary == PROTEIN
    assert corpus.fingerprint == manifest.fingerprint
    assert corpus.offsets.dtype == np.int64
    lengths = [len(tokens) for tokens in table["tokens"].to_pylist()]
    assert np.array_equal(np.diff(corpus.offsets), lengths)
    assert corpus.tokens == sum(lengths) == corpus.offsets[-1]
    assert np.array_equal(corpus.lengths([[3, 0], [len(lengths) - 1, 5]]), np.array(lengths)[[[3, 0], [-1, 5]]])
    assert len(list(corpus.batches())) > 20


def test_records_are_those_of_the_files(folder, corpus):
    table = tables(folder)["train"]
    rows = list(zip(table["id"].to_pylist(), table["tokens"].to_pylist(), table["taxid"].to_pylist(), strict=True))
    got = [corpus.record(i) for i in range(len(corpus))]
    assert [(r.identifier, r.tokens.tolist(), r.taxid) for r in got] == rows
    for start, stop in ((0, len(rows)), (0, 0), (69, 71), (500, 1203), (len(rows) - 1, len(rows))):
        several = corpus.rows(start, stop)
        assert [(r.identifier, r.tokens.tolist(), r.taxid) for r in several] == rows[start:stop]
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            corpus.record(index)


@settings(max_examples=150, deadline=None)
@given(draw=st.data())
def test_flat_ranges_are_those_of_the_plain_array(corpus, plain, draw):
    start = draw.draw(st.integers(0, corpus.tokens))
    stop = draw.draw(st.integers(start, min(corpus.tokens, start + 40_000)))
    got = corpus.read(start, stop)
    assert got.dtype == np.uint8
    assert np.array_equal(got, plain[0][start:stop])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), longest=st.integers(1, 20_000), spare=st.integers(0, 3))
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_gathered_rows_are_those_of_the_plain_array(corpus, plain, dtype, seed, rows, longest, spare):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, rows, endpoint=True)
    starts = rng.integers(0, corpus.tokens - lengths, endpoint=True)
    out = np.full((rows, longest + spare), 77, dtype)
    assert corpus.gather(starts, lengths, out) is out
    for row, start, length in zip(out, starts, lengths, strict=True):
        assert np.array_equal(row[:length], plain[0][start : start + length])
        assert (row[length:] == PAD).all()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), length=st.integers(1, 30_000))
def test_windows_of_the_stream_have_eos_between_records(corpus, plain, seed, rows, length):
    assert corpus.stream_tokens == plain[1].size
    starts = np.random.default_rng(seed).integers(0, corpus.stream_tokens - length, rows, endpoint=True)
    numbers = np.full((rows, length), -1, np.int64)
    tokens = corpus.stream_window(starts, length, records=numbers)
    assert tokens.dtype == np.uint8
    for i, start in enumerate(starts):
        assert np.array_equal(tokens[i], plain[1][start : start + length])
        assert np.array_equal(numbers[i], plain[2][start : start + length])


@pytest.mark.parametrize("length", [1, 3])
def test_every_place_of_the_stream_is_right(corpus, plain, length):
    """Every border between records, batches and files is met."""
    starts = np.arange(corpus.stream_tokens - length + 1)
    numbers = np.empty((starts.size, length), np.int64)
    tokens = corpus.stream_window(starts, length, np.empty((starts.size, length), np.int16), numbers)
    windows = np.lib.stride_tricks.sliding_window_view
    assert np.array_equal(tokens, windows(plain[1], length))
    assert np.array_equal(numbers, windows(plain[2], length))


def test_record_i_begins_at_its_offset_plus_i(corpus):
    records = np.arange(0, len(corpus), 37)
    ends = corpus.offsets[records + 1] + records
    assert (corpus.stream_window(ends, 1) == EOS).all()
    firsts = corpus.stream_window(corpus.offsets[records] + records, 1)[:, 0]
    assert firsts.tolist() == [int(corpus.record(i).tokens[0]) for i in records]


def test_nothing_is_copied_but_what_is_asked_for(folder, corpus):
    before = pa.total_allocated_bytes()
    opened = Corpus.open(folder, "train")
    assert pa.total_allocated_bytes() - before < 4096
    whole = opened.record(5).tokens
    assert not whole.flags.writeable
    assert not whole.flags.owndata
    start = int(opened.offsets[5])
    assert np.shares_memory(opened.read(start, start + 3), whole)
    assert not opened.offsets.flags.owndata


def test_open_files_do_not_pile_up(folder):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    opened = [Corpus.open(folder, "train") for _ in range(3)]
    # one for each map of NumPy's; none for the Arrow files, of which a corpus may have many
    assert len(os.listdir("/proc/self/fd")) - before <= len(opened)  # noqa: PTH208


def test_a_corpus_can_be_sent_to_another_process(corpus):
    copy = pickle.loads(pickle.dumps(corpus))
    assert len(pickle.dumps(corpus)) < 1000
    assert (copy.split, copy.fingerprint, len(copy)) == (corpus.split, corpus.fingerprint, len(corpus))
    assert np.array_equal(copy.read(0, 100), corpus.read(0, 100))


def test_what_lies_outside_is_refused(corpus):
    with pytest.raises(ValueError, match="not all in a corpus"):
        corpus.read(-1, 3)
    with pytest.raises(ValueError, match="not all in a corpus"):
        corpus.gather([0, corpus.tokens], [1, 1])
    with pytest.raises(ValueError, match="not all in a corpus"):
        corpus.stream_window([corpus.stream_tokens - 2], 3)
    with pytest.raises(ValueError, match="do not fit"):
        corpus.gather([0], [5], np.empty((1, 4), np.uint8))
    with pytest.raises(ValueError, match="is no place for"):
        corpus.stream_window([0], 5, np.empty((1, 4), np.uint8))
    assert corpus.gather([], []).shape == (0, 0)
    assert corpus.gather([corpus.tokens], [0]).shape == (1, 0)
    assert corpus.read(corpus.tokens, corpus.tokens).size == 0


# what is no corpus, or no longer the same


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def refusal(path: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as refused:
        Corpus.open(path, split)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert "; " in sentence
    return sentence


def test_what_is_no_whole_corpus_does_not_open(copy, tmp_path):
    assert "there is no such corpus" in refusal(tmp_path / "none")
    for folder in (tmp_path, Path(), Path("/")):
        assert "is no prepared corpus, it has no manifest.json" in refusal(folder)
    assert "has no dev split, only train, valid, test, ood" in refusal(copy, "dev")
    partial = copy.rename(tmp_path / "big.partial")
    assert "is not finished; start `longseq data prepare` again" in refusal(partial)
    assert "is not finished; start `longseq data prepare` again" in refusal(tmp_path / "big")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "splits": {"train": 3}}'])
def test_a_damaged_manifest_is_said(copy, content):
    (copy / "manifest.json").write_text(content)
    assert "manifest.json is damaged" in refusal(copy)


def test_a_corpus_of_another_format_is_said(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    assert "format 2 of another version" in refusal(copy)


@pytest.mark.parametrize("pattern", ["data-00001-of-*.arrow", "offsets.npy"])
def test_a_missing_or_cut_file_does_not_open(copy, pattern):
    path = next((copy / "train").glob(pattern))
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert f"{path} has changed since it was prepared" in refusal(copy)
    path.unlink()
    assert f"{path} is missing" in refusal(copy)


def test_a_file_whose_structure_is_damaged_does_not_open(copy):
    path = next((copy / "train").glob("data-00001-of-*.arrow"))
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert f"{path} is damaged" in refusal(copy)
    offsets = copy / "valid" / "offsets.npy"
    offsets.write_bytes(b"\xff" * offsets.stat().st_size)
    assert f"{offsets} cannot be read" in refusal(copy, "valid")


# verify


def damage(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        verify(path)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path} is damaged: ")
    assert "\n" not in sentence
    assert sentence.endswith("prepare the corpus again with --overwrite.")
    return sentence


def test_a_whole_corpus_is_verified(folder):
    stages = []
    verified = verify(folder, progress=lambda *said: stages.append(said))
    manifest = read_manifest(folder)
    assert verified.fingerprint == manifest.fingerprint
    assert verified.records == verified.compared == sum(split.records for split in manifest.splits.values())
    on_disk = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert verified.files == len(on_disk)
    assert verified.bytes == sum(path.stat().st_size for path in on_disk)
    assert stages[-1] == ("cells", 128, 128)


def test_of_a_large_corpus_a_part_is_compared_unless_all_is_asked_for(folder, monkeypatch):
    from longseq_data.prepare import verify as verifying

    monkeypatch.setattr(verifying, "SMALL", 100)
    part = verify(folder)
    assert 0 < part.compared < part.records / 10
    assert verify(folder, full=True).compared == part.records


@pytest.mark.parametrize("trial", range(12))
def test_a_changed_bit_is_found_and_its_file_named(copy, trial):
    rng = random.Random(trial)
    path = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json"))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    assert f"{path.relative_to(copy)} has another SHA-256" in damage(copy)


def test_missing_cut_and_several_files_are_named(copy):
    files = sorted((copy / "train").glob("*.arrow"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    (copy / "valid" / "state.json").write_text("{}")
    said = damage(copy)
    assert f"train/{files[0].name} is missing" in said
    assert f"train/{files[1].name} has " in said
    assert "valid/state.json has " in said


def changed_manifest(copy: Path, change) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_that_does_not_fit_is_found(copy):
    changed_manifest(copy, lambda manifest: manifest["splits"]["train"].update(tokens=5))
    assert "the fingerprint in manifest.json is not that of what it describes" in damage(copy)


def rewritten(copy: Path, split: str, change) -> None:
    """Change the first Arrow file of a split, with a manifest that has its checksum: as a bug of ours might."""
    path = sorted((copy / split).glob("*.arrow"))[0]
    table = change(pa.ipc.open_stream(path.read_bytes()).read_all())
    with path.open("wb") as handle, pa.ipc.new_stream(handle, table.schema) as writer:
        writer.write_table(table.combine_chunks())

    def change_manifest(manifest: dict) -> None:
        for file in manifest["splits"][split]["files"]:
            if file["name"] == f"{split}/{path.name}":
                file.update(size=path.stat().st_size, sha256=sha256_of(path))

    changed_manifest(copy, change_manifest)


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def test_tokens_outside_the_vocabulary_are_found(copy):
    def change(table: pa.Table) -> pa.Table:
        tokens = table["tokens"].to_pylist()
        tokens[3][0] = 25
        return with_column(table, "tokens", tokens)

    rewritten(copy, "train", change)
    assert "batch 0 of train has tokens outside the vocabulary" in damage(copy)


def test_rows_out_of_place_are_found(copy):
    rewritten(copy, "valid", lambda table: table.take([1, 0, *range(2, table.num_rows)]))
    with pytest.raises(DataError, match=r"not in its place|the offsets of batch"):
        verify(copy)


def test_another_id_is_found_by_its_split_or_by_the_fingerprint(tmp_path):
    copy = tmp_path / "corpus"
    prepare(PrepareConfig(sources=write_files(tmp_path / "files"), output=str(copy), workers=1, split_by="id"))

    def change(table: pa.Table, name: str) -> pa.Table:
        identifiers = table["id"].to_pylist()
        identifiers[0] = name
        return with_column(table, "id", identifiers)

    other = next(name for name in map(str, range(999)) if split_of(name, 0.05, 0.05) == "test")
    same = next(name for name in map(str, range(999)) if split_of(name, 0.05, 0.05) == "train")
    rewritten(copy, "train", lambda table: change(table, other))
    assert "record 0 of train belongs to another split by its id" in damage(copy)
    rewritten(copy, "train", lambda table: change(table, same))
    assert "the rows of train are not those of the fingerprint" in damage(copy)


def test_a_record_of_another_split_is_found_by_its_sequence(copy):
    changed_manifest(copy, lambda manifest: manifest["settings"].update(valid_fraction=0.9))
    assert "of train belongs to another split by its sequence" in damage(copy)


def test_another_taxid_is_found_by_the_fingerprint(copy):
    def change(table: pa.Table) -> pa.Table:
        return with_column(table, "taxid", [7, *table["taxid"].to_pylist()[1:]])

    rewritten(copy, "test", change)
    assert "the rows of test are not those of the fingerprint" in damage(copy)


def test_sequences_that_come_twice_are_found(tmp_path):
    sources = write_files(tmp_path / "files", records=3000)
    prepare(PrepareConfig(sources=sources, output=str(tmp_path / "c"), workers=1, deduplicate=False))
    assert verify(tmp_path / "c").records == 3000
    changed_manifest(tmp_path / "c", lambda manifest: manifest["settings"].update(deduplicate=True))
    said = damage(tmp_path / "c")
    assert " is in train too" in said
    assert " more; restore" in said
