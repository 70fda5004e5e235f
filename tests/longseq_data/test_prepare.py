"""From sequence files to a corpus: what is in it, and that it is always the same."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corpora import ALPHABET, LETTERS, config, data_files, expected, found, made, tables
from longseq_data.prepare import prepare as preparing
from longseq_data.prepare import reduce_stage
from longseq_data.prepare.prepare import prepare
from longseq_data.readers.fasta import read_records


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
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b") == data_files(tmp_path / "c")
    assert first.fingerprint == second.fingerprint == third.fingerprint
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_the_fingerprint_is_that_of_the_content_not_of_its_cutting(files, tmp_path, small_parts, monkeypatch):
    first, _ = prepare(config(files, tmp_path / "a"))
    monkeypatch.setattr(reduce_stage, "SHARD_BYTES", 1 << 30)
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

    monkeypatch.setattr(reduce_stage, "BATCH_TOKENS", 20_000)
    monkeypatch.setattr(reduce_stage, "BATCH_ROWS", 150)
    prepare(config(files, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(files)
    with pa.memory_map(str(next((tmp_path / "c" / "train").glob("*.arrow")))) as handle:
        batches = list(pa.ipc.open_stream(handle))
    assert len(batches) > 20
    for batch in batches[:-1]:
        tokens = len(batch["tokens"].values)
        last = len(batch["tokens"][-1])
        assert (tokens >= 20_000 and tokens - last < 20_000) or batch.num_rows == 150


@pytest.mark.interfaces
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


def test_a_hundred_thousand_copies_are_one_record(tmp_path, small_parts):
    source = tmp_path / "copies.fasta"
    source.write_text("".join(f">r{i:07d}\nMKV\n" for i in reversed(range(100_000))) + ">other\nAC\n")
    for workers in (1, 2):
        manifest, _ = prepare(config([str(source)], tmp_path / f"c{workers}", workers=workers))
        assert sorted(row for split in found(tmp_path / f"c{workers}").values() for row in split) == [
            "other",
            "r0000000",
        ]
        assert manifest.report["duplicates"] == 99_999


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
            "import resource; from longseq_data.prepare.prepare import prepare\n"
            "from longseq_data.prepare.config import PrepareConfig\n"
            f"prepare(PrepareConfig({names}, workers=1, memory_mb=64))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        return float(done.stdout)

    small, large = peak(8_000), peak(80_000)  # 8 MB, 80 MB
    assert large - small < 32


def test_dask_is_imported_by_several_workers_alone(files, tmp_path):
    code = (
        "import sys; from longseq.cli import main; from longseq_data.prepare.prepare import prepare\n"
        "from longseq_data.prepare.config import PrepareConfig\n"
        f"prepare(PrepareConfig({files!r}, {str(tmp_path / 'c')!r}, workers=2))\n"  # too little for two
        "assert not {'distributed', 'dask'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
