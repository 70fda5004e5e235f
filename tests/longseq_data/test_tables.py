"""Parquet files and Hub datasets: rows as documents, whatever the worker, and refusals that name file and row."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longseq_data.errors import DataError
from longseq_data.ingest.parse import parsed
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading
from longseq_data.readers.tables import read_hub, read_parquet
from longseq_data.samples.batches import EvaluationBatches, Loader
from longseq_data.samples.streaming import StreamSpec
from longseq_data.vocabulary import BYTES

pytestmark = pytest.mark.interfaces

ROWS = [f"row {i}: naïve 日本 {'x' * (i % 5)}" for i in range(53)]


@pytest.fixture
def parquet(tmp_path):
    """parquet(name, column=values, ...): a Parquet file with row groups of 7; gives its path."""

    def parquet(name: str, **columns: object) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=7)
        return str(path)

    return parquet


@pytest.fixture
def hub(tmp_path) -> str:
    """The address of a local dataset of ROWS in three files."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for shard in range(3):
        rows = [json.dumps({"text": text, "n": 1}) for text in ROWS[shard::3]]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(rows))
    return f"hub:{folder}#train"


def spec_of(source: str, **reading) -> StreamSpec:
    reading = Reading(**{"format": "auto", "tokens": "bytes", **reading})
    return StreamSpec((source,), None, 0.0, 0.0, 64, "crop", "causal", 5, 8, reading=reading)


def texts(source: str, workers: int) -> list[str]:
    batches = EvaluationBatches(spec_of(source), batch_sequences=4, rank=0, world=1)
    found = []
    for batch in Loader(batches, workers):
        for row in batch["tokens"]:
            letters = bytes(row[row < BYTES.ordinary].tolist()).decode()
            found += [letters] if letters else []
    return found


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_every_row_of_a_text_column_is_a_document(kind, parquet):
    values = [value.encode() for value in ROWS] if kind == pa.binary() else ROWS
    source = parquet("a.parquet", text=pa.array(values).cast(kind), other=list(range(53)))
    found = list(read_parquet(source, "text", 1 << 20, strict=False))
    assert [text.data.decode() for text in found] == ROWS
    assert [(text.identifier, text.line) for text in found] == [(f"a.parquet:{i}", i) for i in range(1, 54)]


def test_null_and_blank_rows_are_none_and_long_ones_several(parquet):
    source = parquet("a.parquet", body=["one", None, "", " ", "word " * 50], id=["x", "y", "z", "w", "v"])
    found = list(read_parquet(source, "body", 100, strict=False))
    assert [text.identifier for text in found] == ["x", "v", "v#1", "v#2"]
    assert b"".join(text.data for text in found[1:]) == b"word " * 50


def test_bytes_of_a_string_column_that_are_no_utf8_do_not_stop_reading(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    (text,) = read_parquet(str(tmp_path / "a.parquet"), "text", 100, strict=False)
    assert text.data == b"a\xffb"


def test_a_large_file_is_never_in_memory(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(4000))  # 90 kB
    writer = pq.ParquetWriter(tmp_path / "large.parquet", pa.schema([("text", pa.string())]), compression="none")
    for number in range(40):
        writer.write_table(pa.table({"text": [f"{number} {row} {text}" for row in range(20)]}))
    writer.close()
    pq.write_table(pa.table({"text": [text]}), tmp_path / "small.parquet")
    code = (
        "import sys; from pathlib import Path; from longseq_data.readers.tables import read_parquet\n"
        "def read(path): return sum(len(text.data) for text in read_parquet(path, 'text', 1 << 20, False)) >> 20\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) >> 10\n"
        "read(sys.argv[1]); before = peak(); print(read(sys.argv[2]), peak() - before)"
    )
    files = [tmp_path / "small.parquet", tmp_path / "large.parquet"]
    out = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    read, grown = map(int, out.stdout.split())
    assert read >= 70
    assert grown < 30


def test_parquet_by_url(parquet, http_address):
    parquet("a.parquet", text=ROWS)
    found = read_parquet(f"{http_address}/a.parquet", "text", 1 << 20, strict=False)
    assert [text.data.decode() for text in found] == ROWS


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"texts": ROWS}, r": there is no 'text' \(data.column\) among texts; did you mean texts\?"),
        ({"n": [1], "m": [2]}, r": there is no 'text' \(data.column\) among n, m; name one of them"),
        ({"text": [1, 2]}, ": column 'text' is int64 and holds no text; name the column"),
        ({"text": [["a"]]}, ": column 'text' is list.* and holds no text"),
        ({"text": pa.array([None, None], pa.string())}, ": nothing but white space in it"),
        ({"text": pa.array([], pa.string())}, ": nothing but white space in it"),
    ],
)
def test_tables_without_text_are_refused(columns, sentence, parquet):
    source = parquet("a.parquet", **columns)
    with pytest.raises(DataError, match=sentence) as caught:
        list(parsed(Reading("parquet", "bytes"), Leaf(source, "parquet"), strict=False))
    assert str(caught.value).startswith(source)


@pytest.mark.parametrize("content", [b"", b"text", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_what_is_no_parquet_is_refused(content, write):
    source = write("a.parquet", content)
    with pytest.raises(DataError, match=r"is empty; give a Parquet file|no Parquet file, or a damaged one"):
        list(read_parquet(source, "text", 100, strict=False))


def refusal(source: str) -> str | None:
    try:
        list(read_parquet(source, "text", 1 << 20, strict=False))
    except DataError as error:
        return str(error)
    return None


def test_damaged_parquet_is_a_sentence_or_read(parquet):
    whole = Path(parquet("a.parquet", text=ROWS)).read_bytes()
    rng = random.Random(1)
    refused = []
    for _ in range(60):
        bad = bytearray(whole)
        for _ in range(3):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path = Path(parquet("a.parquet", text=["x"]))
        path.write_bytes(bad)
        refused += [sentence for sentence in [refusal(str(path))] if sentence]
    assert len(refused) > 5
    assert all(sentence.startswith(str(path)) and "\n" not in sentence for sentence in refused)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_hub_dataset_is_streamed_whole_to_every_worker(workers, hub):
    expected = [text for shard in range(3) for text in ROWS[shard::3]]
    assert texts(hub, workers) == expected


@pytest.mark.parametrize("workers", [0, 3])
def test_parquet_rows_come_once_whatever_the_workers(workers, parquet):
    assert texts(parquet("a.parquet", text=ROWS), workers) == ROWS


def test_a_hub_dataset_of_parquet_with_a_configuration_and_splits(parquet, tmp_path):
    parquet("data/train.parquet", body=ROWS)
    parquet("data/other.parquet", body=["other"], id=["x"])
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - {split: train, path: train.parquet}\n"
        "- config_name: two\n  data_files:\n  - {split: held, path: other.parquet}\n---\n"
    )
    one = list(read_hub(f"hub:{tmp_path}/data:one#train", "body", 1 << 20, strict=False))
    assert [text.data.decode() for text in one] == ROWS
    assert one[0].identifier == "data:one#train:1"
    (two,) = read_hub(f"hub:{tmp_path}/data:two#held", "body", 1 << 20, strict=False)
    assert (two.identifier, two.data) == ("x", b"other")


@pytest.mark.parametrize(
    ("change", "column", "sentence"),
    [
        (("#train", "#dev"), "text", "cannot be opened .*dev.*; check the name, configuration and split"),
        (("dataset", "nothing"), "text", "cannot be opened"),
        (("#train", ":conf#train"), "text", "cannot be opened .*conf"),
        (("", ""), "txt", r"there is no 'txt' \(data.column\) among text, n; did you mean text\?"),
        (("", ""), "n", "row 1: 'n' holds a number and no text"),
    ],
)
def test_a_hub_dataset_that_cannot_be_read_is_one_sentence(change, column, sentence, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = hub.replace(*change) if change[0] else hub
    with pytest.raises(DataError, match=sentence) as caught:
        list(read_hub(source, column, 100, strict=False))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(source)


def test_without_a_network_the_hub_is_one_sentence(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub:deepmind/pg19#test: cannot be opened .*; check .*Hugging Face Hub\.$"):
        list(read_hub("hub:deepmind/pg19#test", "text", 100, strict=False))


def test_damaged_rows_of_a_hub_dataset_are_one_sentence(hub):
    folder = Path(hub.removeprefix("hub:").partition("#")[0])
    (folder / "train-2.jsonl").write_text('{"text": "good", "n": 1}\n{nonsense\n')
    with pytest.raises(DataError, match=r"after row \d+: cannot be read") as caught:
        list(read_hub(hub, "text", 100, strict=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary", "json"]
)
def test_text_of_every_arrow_type_reads_as_strings_do(tmp_path: Path, kind: str) -> None:
    rows = ["zwölf", "", None, "ein\nBuch"] * 3  # Polars writes views, pandas' categories are dictionaries
    text = pa.array(rows)
    if kind == "dictionary":
        text = text.dictionary_encode()
    elif kind == "json":
        text = pa.ExtensionArray.from_storage(pa.json_(pa.utf8()), text)
    else:
        text = text.cast(pa.type_for_alias(kind) if kind in ("binary", "large_binary") else getattr(pa, kind)())
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": text, "id": pa.array([f"i{i}" for i in range(12)], pa.string_view())}), path)
    found = [(each.identifier, each.data) for each in read_parquet(str(path), "text", 100, strict=True)]
    assert found == [(f"i{i}", row.encode()) for i, row in enumerate(rows) if row]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"table.parquet: 2 columns are named 'text'"):
        list(read_parquet(str(path), "text", 100, strict=True))


def test_a_hub_that_does_not_answer_is_said_after_two_tries(tmp_path: Path) -> None:
    program = (
        "from longseq_data.errors import DataError\nfrom longseq_data.readers.tables import read_hub\n"
        "try: list(read_hub('hub:nobody/none#train', 'text', 64, False))\nexcept DataError as error: print(error)"
    )
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{closed.getsockname()[1]}"
        settings = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        settings |= {"HF_ENDPOINT": place, "HF_HUB_OFFLINE": "0"}
        ended = subprocess.run(
            [sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True, timeout=60
        )
    assert ended.stdout.startswith(
        f"hub:nobody/none#train: cannot be opened: the Hugging Face Hub ({place}) does not answer ("
    )
    assert "tried twice" in ended.stdout
    assert "Retry" not in ended.stderr
