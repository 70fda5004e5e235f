"""From sequence files to a corpus: what is in it, that it is always the same, and what is refused."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import ALPHABET, LETTERS, contents, expected, found, tables, write_files
from longseq_data import prepare as preparing
from longseq_data import prepare_map, prepare_reduce
from longseq_data.errors import DataError
from longseq_data.fasta import read_records
from longseq_data.prepare import prepare
from longseq_data.prepare_config import PrepareConfig
from longseq_data.prepare_reader import ProteinReader, Stored, cut


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a source and several shards a split, of a corpus of one megabyte."""
    monkeypatch.setattr(preparing, "SMALLEST_BLOCK", 60_000)
    monkeypatch.setattr(prepare_reduce, "SHARD_BYTES", 200_000)


def config(files: list[str], place: Path, **changes: object) -> PrepareConfig:
    return PrepareConfig(**{"sources": files, "output": str(place), "workers": 1, **changes})  # type: ignore[arg-type]


def made(files: list[str], output: Path, **changes: object) -> dict[str, dict[str, tuple[str, int]]]:
    prepare(config(files, output, **changes))
    return found(output)


def data(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name != "manifest.json"}


@pytest.mark.parametrize("workers", [1, 2])
def test_splits_and_duplicates_are_those_of_a_plain_count(files, tmp_path, small_parts, workers):
    manifest, new = prepare(config(files, tmp_path / "c", workers=workers))
    assert new
    wanted = expected(files)
    assert found(tmp_path / "c") == wanted
    assert {name: split.records for name, split in manifest.splits.items()} == {n: len(s) for n, s in wanted.items()}
    assert {name: split.tokens for name, split in manifest.splits.items()} == {
        name: sum(len(letters) for letters, _ in rows.values()) for name, rows in wanted.items()
    }
    assert manifest.report["records"] == 9000
    assert manifest.report["duplicates"] == 9000 - sum(map(len, wanted.values())) > 100
    assert len(list((tmp_path / "c" / "train").glob("*.arrow"))) == 4
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*"))


def test_unknown_letters_are_counted_as_a_plain_count_does(files, tmp_path):
    from Bio import SeqIO

    manifest, _ = prepare(config(files, tmp_path / "c"))
    letters: Counter[str] = Counter()
    for name in files:
        with gzip.open(name, "rt") if name.endswith(".gz") else Path(name).open() as handle:
            for record in SeqIO.parse(handle, "fasta"):
                letters.update(str(record.seq).upper().removesuffix("*"))
    assert manifest.report["unknown_letters"] == {x: n for x, n in sorted(letters.items()) if x not in ALPHABET}
    assert set(manifest.report["unknown_letters"]) == {"J", "-"}


def test_lengths_in_the_manifest_are_those_of_the_records(files, tmp_path):
    manifest, _ = prepare(config(files, tmp_path / "c"))
    lengths = np.array([len(letters) for letters, _ in expected(files)["train"].values()])
    described = manifest.splits["train"].lengths
    assert (described.shortest, described.longest) == (lengths.min(), lengths.max())
    for percent, length in described.quantiles.items():
        assert length == np.quantile(lengths, int(percent) / 100, method="lower")
    powers = Counter(int(length).bit_length() - 1 for length in lengths)
    assert described.histogram == {str(power): powers[power] for power in sorted(powers)}


def test_bytes_depend_on_the_records_alone(files, tmp_path, small_parts, monkeypatch):
    """Not on workers, memory, blocks, the order of the sources, nor on how they are cut into files."""
    first, _ = prepare(config(files, tmp_path / "a"))
    second, _ = prepare(config(files[::-1], tmp_path / "b", workers=2, memory_mb=64))
    monkeypatch.setattr(preparing, "SMALLEST_BLOCK", 1 << 20)
    monkeypatch.setattr(preparing, "REDUCE_MEMORY", 10_000)  # many ranges a shard
    whole = b"".join(gzip.decompress(Path(n).read_bytes()) if n.endswith("z") else Path(n).read_bytes() for n in files)
    (tmp_path / "whole.fasta").write_bytes(whole)
    third, _ = prepare(config([str(tmp_path / "whole.fasta")], tmp_path / "c", memory_mb=64))
    assert data(tmp_path / "a") == data(tmp_path / "b") == data(tmp_path / "c")
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_the_fingerprint_is_that_of_the_content_not_of_its_cutting(files, tmp_path, small_parts, monkeypatch):
    first, _ = prepare(config(files, tmp_path / "a"))
    monkeypatch.setattr(prepare_reduce, "SHARD_BYTES", 1 << 30)
    second, _ = prepare(config(files, tmp_path / "b"))
    assert len(first.splits["train"].files) > len(second.splits["train"].files)
    assert first.fingerprint == second.fingerprint
    third, _ = prepare(config(files, tmp_path / "c", min_length=20))
    assert third.fingerprint != first.fingerprint


def test_the_order_is_that_of_hashes_and_so_unrelated_to_the_input(files, tmp_path, small_parts):
    prepare(config(files, tmp_path / "c"))
    for table in tables(tmp_path / "c").values():
        rows = [bytes(tokens) for tokens in table["tokens"].to_pylist()]
        assert rows == sorted(rows, key=lambda row: hashlib.blake2b(row, digest_size=16).digest())
    places = {record.identifier: i for i, record in enumerate(r for name in files for r in read_records(name))}
    train = np.array([places[identifier] for identifier in tables(tmp_path / "c")["train"]["id"].to_pylist()])
    assert abs(np.corrcoef(train, np.arange(train.size))[0, 1]) < 0.05


def test_record_batches_are_closed_when_full(files, tmp_path, monkeypatch):
    import pyarrow as pa

    monkeypatch.setattr(prepare_reduce, "BATCH_TOKENS", 20_000)
    monkeypatch.setattr(prepare_reduce, "BATCH_ROWS", 150)
    prepare(config(files, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(files)
    with pa.memory_map(str(next((tmp_path / "c" / "train").glob("*.arrow")))) as handle:
        batches = list(pa.ipc.open_stream(handle))
    assert len(batches) > 20
    for batch in batches[:-1]:
        tokens = len(batch["tokens"].values)
        last = len(batch["tokens"][-1])
        assert (tokens >= 20_000 and tokens - last < 20_000) or batch.num_rows == 150


def test_datasets_opens_a_corpus_without_copying_it(files, tmp_path, small_parts):
    import datasets
    import pyarrow as pa

    prepare(config(files, tmp_path / "c"))
    before = pa.total_allocated_bytes()
    opened = datasets.load_from_disk(str(tmp_path / "c"), keep_in_memory=False)
    assert pa.total_allocated_bytes() - before < 4096
    assert isinstance(opened, datasets.DatasetDict)
    assert opened["train"].features == datasets.Features(
        {
            "id": datasets.Value("string"),
            "tokens": datasets.LargeList(datasets.Value("uint8")),
            "taxid": datasets.Value("int64"),
        }
    )
    wanted = expected(files)
    assert {name: split.num_rows for name, split in opened.items()} == {
        name: len(rows) for name, rows in wanted.items()
    }
    row = opened["valid"][3]
    assert ("".join(ALPHABET[token] for token in row["tokens"]), row["taxid"]) == wanted["valid"][row["id"]]
    assert str(opened["train"].split) == "train"
    assert opened["train"]._fingerprint != opened["valid"]._fingerprint
    # what datasets would write of the same features into an Arrow file
    stored = pa.ipc.open_stream(next((tmp_path / "c" / "train").glob("*.arrow")).read_bytes()).schema
    assert json.loads(stored.metadata[b"huggingface"]) == json.loads(
        opened["train"].features.arrow_schema.metadata[b"huggingface"]
    )


# what is left out


@pytest.mark.parametrize(
    ("changes", "keep", "reasons"),
    [
        ({"min_length": 50}, lambda i, s, t: len(s) >= 50, {"too short"}),
        ({"max_length": 99}, lambda i, s, t: len(s) <= 99, {"too long"}),
        ({"min_length": 30, "max_length": 30}, lambda i, s, t: len(s) == 30, {"too short", "too long"}),
        ({"include_taxids": [9606, 2157]}, lambda i, s, t: t in (9606, 2157), {"TaxID not included"}),
        ({"exclude_taxids": [9606, -1]}, lambda i, s, t: t not in (9606, -1), {"TaxID excluded"}),
        (
            {"unknown": "drop", "max_unknown": 0.02},
            lambda i, s, t: s.count("X") <= 0.02 * len(s),
            {"too many unknown letters"},
        ),
    ],
)
def test_filters_leave_out_what_they_say(files, tmp_path, changes, keep, reasons):
    manifest, _ = prepare(config(files, tmp_path / "c", **changes))
    assert found(tmp_path / "c") == expected(files, keep=keep)
    assert set(manifest.report["filtered"]) == reasons
    kept = sum(split.records for split in manifest.splits.values())
    assert kept + manifest.report["duplicates"] + sum(manifest.report["filtered"].values()) == 9000


def test_without_deduplication_every_record_stays(files, tmp_path):
    assert made(files, tmp_path / "c", deduplicate=False) == expected(files, deduplicate=False)


def test_a_million_copies_are_one_record(tmp_path, small_parts):
    source = tmp_path / "copies.fasta"
    source.write_text("".join(f">r{i:07d}\nMKV\n" for i in reversed(range(100_000))) + ">other\nAC\n")
    for workers in (1, 2):
        manifest, _ = prepare(config([str(source)], tmp_path / f"c{workers}", workers=workers))
        assert sorted(row for split in found(tmp_path / f"c{workers}").values() for row in split) == [
            "other",
            "r0000000",
        ]
        assert manifest.report["duplicates"] == 99_999


def test_refused_letters_are_said_with_their_line(write, tmp_path):
    source = write("a.fasta", ">a\nACD\nEFG\n>b\nAC\nAJC\n")
    with pytest.raises(DataError, match=r"a\.fasta, line 6: character 'J' in record 'b' .* set unknown=x"):
        prepare(config([source], tmp_path / "c", unknown="refuse"))
    assert not (tmp_path / "c").exists()


# which records are held out


def rows_of(split: dict[str, tuple[str, int]]) -> set[str]:
    return set(split)


def test_a_list_of_ids_makes_the_ood_split(files, tmp_path):
    ids = [record.identifier for record in read_records(files[0])][:300]
    listed = tmp_path / "ids.txt"
    # whole ids, accessions, headers, comments
    listed.write_text(
        "# held out\n"
        + "\n".join(ids[:100])
        + "\n\n"
        + "\n".join(name.removeprefix("UniRef50_") for name in ids[100:200])
        + "\n"
        + "".join(f">{name} a protein  # note\n" for name in ids[200:])
    )
    wanted = expected(files, held_out=lambda identifier, taxid: identifier in set(ids))
    assert len(wanted["ood"]) > 250
    assert made(files, tmp_path / "c", ood_ids=str(listed)) == wanted
    (tmp_path / "ids.gz").write_bytes(gzip.compress(listed.read_bytes()))
    assert made(files, tmp_path / "d", ood_ids=str(tmp_path / "ids.gz"), workers=2) == wanted


P12345 = ["sp|P12345|A_B", "tr|P12345|C_D", "UniRef90_P12345", "P12345-2", "UniRef100_P12345-3", "P12345"]


@pytest.mark.parametrize(
    ("listed", "held_out"),
    [
        ("P12345", P12345),
        ("P12345-2", ["P12345-2"]),
        (
            "sp|P12345|A_B",
            ["sp|P12345|A_B", "tr|P12345|C_D", "UniRef90_P12345", "P12345-2", "UniRef100_P12345-3", "P12345"],
        ),
        ("r", ["r"]),
        ("r-1", ["r-1"]),
    ],
)
def test_records_are_found_by_accession(listed, held_out, write, tmp_path):
    names = [*P12345, "r", "r-1", "r-2", "P123456", "A0A023GPI8"]
    source = write("a.fasta", "".join(f">{name}\n{LETTERS[i:]}\n" for i, name in enumerate(names)))
    rows = made([source], tmp_path / "c", ood_ids=write("ids", listed))
    assert rows_of(rows["ood"]) == set(held_out)


def test_taxids_make_the_ood_split_and_take_copies_with_them(files, tmp_path):
    wanted = expected(files, held_out=lambda identifier, taxid: taxid == 10239)
    rows = made(files, tmp_path / "c", ood_taxids=[10239])
    assert rows == wanted
    assert {taxid for _, taxid in rows["ood"].values()} != {10239}  # a copy of a held-out sequence is held out
    assert 10239 not in {taxid for name in ("train", "valid", "test") for _, taxid in rows[name].values()}


PFAM_TSV = (
    "Entry\tEntry Name\tPfam\nA00001\tx\tPF00001;\nA00002\ty\tPF00002;PF00001;\nA00003\tz\tPF00003;\nA00004\tw\t\n"
    "A00005\tv\tPF00004.12\n"
)
PFAM_FASTA = "".join(f">UniRef50_A0000{i}\n{LETTERS[i:]}\n" for i in range(1, 7))


@pytest.mark.parametrize(
    ("families", "held_out"), [(["PF00001"], {1, 2}), (["PF00002", "PF00004"], {2, 5}), (["PF00003"], {3})]
)
def test_pfam_families_make_the_ood_split(families, held_out, write, tmp_path):
    rows = made(
        [write("a.fasta", PFAM_FASTA)], tmp_path / "c", ood_pfam_map=write("p.tsv", PFAM_TSV), ood_pfam=families
    )
    assert rows_of(rows["ood"]) == {f"UniRef50_A0000{i}" for i in held_out}


def test_a_map_needs_no_header(write, tmp_path):
    rows = made(
        [write("a.fasta", PFAM_FASTA)],
        tmp_path / "c",
        ood_pfam_map=write("p.tsv", "A00001\tPF00001,PF00002\nA00003\tPF00003\n"),
        ood_pfam=["PF00002"],
    )
    assert rows_of(rows["ood"]) == {"UniRef50_A00001"}


def test_families_are_drawn_by_the_seed(write, tmp_path):
    tsv = "Entry\tPfam\n" + "".join(f"A{i:05d}\tPF{i % 40:05d};PF{(i * 7) % 40:05d};\n" for i in range(400))
    fasta = "".join(f">UniRef50_A{i:05d}\n{LETTERS}{LETTERS[i % 20]}{LETTERS[i // 20]}\n" for i in range(400))
    source, mapped = write("a.fasta", fasta), write("p.tsv", tsv)
    drawn = []
    for number, seed in enumerate([0, 1, 0]):
        manifest, _ = prepare(
            config([source], tmp_path / f"c{number}", ood_pfam_map=mapped, ood_pfam_random=5, seed=seed)
        )
        families = manifest.report["held_out_families"]
        assert len(set(families)) == 5
        members = {
            f"UniRef50_A{i:05d}"
            for i in range(400)
            if {f"PF{i % 40:05d}", f"PF{(i * 7) % 40:05d}"} & set(families)  # type: ignore[arg-type]
        }
        assert rows_of(found(tmp_path / f"c{number}")["ood"]) == members
        drawn.append(families)
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ood_ids": ""}, "ood_ids has no ids; write one a line."),
        ({"ood_ids": "# nothing\n"}, "ood_ids has no ids; write one a line."),
        ({"ood_pfam_map": "A\tPF1\n", "ood_pfam": ["PF00001"]}, "line 1: 'PF1' is no Pfam accession;"),
        ({"ood_pfam_map": "A\tPF00001\nB\n", "ood_pfam": ["PF00001"]}, "line 2: a row needs an id and its Pfam"),
        ({"ood_pfam_map": "A\tPF00001\n", "ood_pfam": ["PF00002"]}, "no record belongs to PF00002 of ood_pfam;"),
        ({"ood_pfam_map": "A\tPF00001\n", "ood_pfam_random": 2}, "ood_pfam_random=2, and the file has 1 families;"),
    ],
)
def test_bad_lists_are_refused_with_their_line(changes, sentence, write, tmp_path):
    for name in ("ood_ids", "ood_pfam_map"):
        if name in changes:
            changes = {**changes, name: write("list", changes[name])}
    with pytest.raises(DataError) as refused:
        prepare(config([write("a.fasta", PFAM_FASTA)], tmp_path / "c", **changes))
    assert str(refused.value).startswith(str(tmp_path / "list"))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sources": []}, "sources is empty"),
        ({"output": " "}, "output is missing"),
        ({"min_length": 5, "max_length": 4}, "max_length=4 is below min_length=5"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train"),
        ({"include_taxids": [1], "exclude_taxids": [1]}, "TaxID 1 stands in include_taxids and in exclude_taxids"),
        ({"ood_taxids": [1], "exclude_taxids": [1]}, "TaxID 1 stands in ood_taxids and in exclude_taxids"),
        ({"ood_taxids": [1], "include_taxids": [2]}, "TaxID 1 of ood_taxids is not in include_taxids"),
        ({"ood_pfam": ["PF00001"]}, "ood_pfam_map is missing"),
        ({"ood_pfam_random": 3}, "ood_pfam_map is missing"),
        ({"ood_pfam_map": "m"}, "ood_pfam_map alone holds nothing out"),
        ({"ood_pfam_map": "m", "ood_pfam": ["PF1"]}, "'PF1' is no Pfam accession"),
        ({"ood_pfam_map": "m", "ood_pfam": ["PF00001"], "ood_pfam_random": 1}, "are both set"),
        ({"ood_ids": "missing"}, "no such file"),
        ({"min_length": 10_000}, "no record passes the filters (9,000 too short)"),
        ({"sources": ["missing.fasta"]}, "missing.fasta does not exist"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence, files, tmp_path):
    with pytest.raises(DataError) as refused:
        prepare(config(files, tmp_path / "c", **changes))
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "c").exists()


# reading by blocks

ODD_LINES = st.sampled_from(
    [
        *(">a", ">b c", ">", "> x", ">é n=1", ">c TaxID=7 OX=8", ">d OX=-3"),
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
    from longseq_data import prepare_reader

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
        (b"ACD\n", "text before the first header"),
        (gzip.compress(b">a\nACD\n" * 90_000, 0)[:-400_000], "the gzip data ends too early"),
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


# interruptions, names, full disks


def test_an_interruption_at_any_step_changes_nothing(files, tmp_path, small_parts, monkeypatch):
    """Stopped before a rename, which is how every step ends: after none twice, after one twice, and so on."""
    prepare(config(files, tmp_path / "whole"))
    rename, stopped = Path.replace, 0
    taken: list[int] = []

    def stopping(self: Path, target: Path) -> Path:
        taken.append(1)
        if len(taken) > stopped // 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    while True:
        taken.clear()
        try:
            prepare(config(files, tmp_path / "c"))
            break
        except KeyboardInterrupt:
            stopped += 1
            assert not (tmp_path / "c").exists()
            assert stopped < 500
    assert stopped > 15
    assert data(tmp_path / "c") == data(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_done_twice(files, tmp_path, small_parts, monkeypatch):
    stored, shards = [], []
    store, reduce = prepare_map.store, preparing.reduce_shard
    monkeypatch.setattr(prepare_map, "store", lambda task, path, *rest: (stored.append(path), store(task, path, *rest)))

    def stop_at_two(task, shard):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(shard)
        reduce(task, shard)

    monkeypatch.setattr(preparing, "reduce_shard", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(files, tmp_path / "c"))
    monkeypatch.setattr(preparing, "reduce_shard", lambda task, shard: (shards.append(shard), reduce(task, shard)))
    prepare(config(files, tmp_path / "c"))
    assert len(stored) == len(set(stored)) > 3
    assert shards == [0, 1, 2, 3]


@pytest.fixture
def interrupted(files, tmp_path, monkeypatch):
    """A copy of the files, and a preparation of them that was stopped before its second half."""
    copies = [tmp_path / Path(name).name for name in files]
    for name, copy in zip(files, copies, strict=True):
        copy.write_bytes(Path(name).read_bytes())

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "reduce_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(list(map(str, copies)), tmp_path / "c"))
    return copies


def test_another_configuration_is_said_and_starts_over_only_when_told(interrupted, tmp_path):
    names = list(map(str, interrupted))
    with pytest.raises(DataError, match=r"c\.partial was begun with other .*: min_length was 1 and is 9; .* --restart"):
        prepare(config(names, tmp_path / "c", min_length=9))
    manifest, _ = prepare(config(names, tmp_path / "c", min_length=9), restart=True)
    assert manifest.settings["min_length"] == 9
    assert found(tmp_path / "c") == expected(names, keep=lambda i, s, t: len(s) >= 9)


def test_workers_and_memory_may_change_between_starts(interrupted, tmp_path):
    names = list(map(str, interrupted))
    prepare(config(names, tmp_path / "c", workers=2, memory_mb=64))
    assert found(tmp_path / "c") == expected(names)


def test_a_changed_source_is_said(interrupted, tmp_path):
    names = list(map(str, interrupted))
    interrupted[1].write_text(">new\nACD\n")
    with pytest.raises(DataError, match=r"part1\.fasta has changed; .* --restart"):
        prepare(config(names, tmp_path / "c"))
    with pytest.raises(DataError, match=r"part1\.fasta is no longer among the sources"):
        prepare(config([names[0], names[2]], tmp_path / "c"))


def test_a_corpus_that_is_there_is_left_as_it_is(files, tmp_path):
    first, new = prepare(config(files, tmp_path / "c"))
    assert new
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    again, new = prepare(config(files[::-1], tmp_path / "c", workers=2))
    assert not new
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == stamps


def test_a_name_that_is_taken_is_refused_unless_told(files, tmp_path):
    prepare(config(files, tmp_path / "c"))
    with pytest.raises(DataError, match=r"c exists, and max_length was null and is 80; .* --overwrite"):
        prepare(config(files, tmp_path / "c", max_length=80))
    with pytest.raises(DataError, match=r"c exists, and .*part2\.fasta\.gz is no longer among the sources"):
        prepare(config(files[:2], tmp_path / "c"))
    prepare(config(files, tmp_path / "c", max_length=80), overwrite=True)
    assert found(tmp_path / "c") == expected(files, keep=lambda i, s, t: len(s) <= 80)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    (tmp_path / "mine").mkdir()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="mine exists, and is no prepared corpus"):
            prepare(config(files, tmp_path / "mine"), overwrite=overwrite)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").touch()
    with pytest.raises(DataError, match="was not made by a preparation"):
        prepare(config(files, tmp_path / "other"))


def test_a_second_preparation_of_the_same_name_is_told(files, tmp_path, monkeypatch):
    def second(*_: object) -> None:
        # a process of its own: a lock holds between processes
        code = (
            "from longseq_data.prepare import prepare\nfrom longseq_data.prepare_config import PrepareConfig\n"
            f"prepare(PrepareConfig(sources=[{files[0]!r}], output={str(tmp_path / 'c')!r}, workers=1))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f"is being prepared already (process {os.getpid()}); wait" in done.stderr
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "reduce_shard", second)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(files, tmp_path / "c"))


def test_a_full_disk_is_said_and_the_work_goes_on_after(files, tmp_path, small_parts, monkeypatch):
    from longseq_data import prepare_reduce

    write = prepare_reduce._Hashed.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare_reduce._Hashed, "write", full)
    with pytest.raises(DataError, match=r"c: the disk is full \(No space left on device\); make room"):
        prepare(config(files, tmp_path / "c"))
    assert not list((tmp_path / "c.partial").rglob("*.partial"))
    monkeypatch.setattr(prepare_reduce._Hashed, "write", write)
    prepare(config(files, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(files)


def test_a_worker_that_is_killed_is_said_and_the_work_goes_on_after(files, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(preparing, "_map_any", _die)
    with pytest.raises(DataError, match="worker process was killed, perhaps because memory ended; lower workers"):
        prepare(config(files, tmp_path / "c", workers=2))
    monkeypatch.undo()
    prepare(config(files, tmp_path / "c", workers=2))
    assert found(tmp_path / "c") == expected(files)


def _die(*_: object) -> None:
    os.kill(os.getpid(), 9)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(LETTERS.encode(), np.uint8)

    def peak(records: int) -> float:
        """MiB of a process that prepares so many records of 1,000 residues."""
        source = tmp_path / f"{records}.fasta"
        with source.open("wb") as handle:
            for start in range(0, records, 1000):
                rows = letters[rng.integers(0, 20, (1000, 1000))]
                handle.write(b"".join(b">r%d\n%s\n" % (start + i, row.tobytes()) for i, row in enumerate(rows)))
        names = f"sources=[{str(source)!r}], output={str(source) + '.c'!r}"
        code = (
            "import resource; from longseq_data.prepare import prepare\n"
            "from longseq_data.prepare_config import PrepareConfig\n"
            f"prepare(PrepareConfig({names}, workers=1, memory_mb=64))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        return float(done.stdout)

    small, large = peak(8_000), peak(80_000)  # 8 MB, 80 MB
    assert large - small < 32
