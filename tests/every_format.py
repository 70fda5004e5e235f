"""The same 37 small documents in every format but FASTA, as streams read them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from longseq_data.readers.reading import Reading
from longseq_data.samples.streaming import StreamSpec
from longseq_data.tokenization import save_tokenizer, train_tokenizer

TEXTS = [f"{i} " + "".join(chr(97 + (i * k) % 26) for k in range(1 + i * 7 % 40)) for i in range(37)]
FORMATS = ["lines", "text", "jsonl", "parquet", "hub", "images", "folder", "tokens", "wide"]
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """Two tokenizers of the same tokens; the wide one has ids beyond 16 bits."""
    files = {format: tmp_path_factory.mktemp("tokenizers") / f"{format}.json" for format in ("tokens", "wide")}
    tokenizer = train_tokenizer(TEXTS, "bpe", 290)
    save_tokenizer(tokenizer, files["tokens"])
    tokenizer.add_tokens([f"unused {i}" for i in range(70_000)])
    save_tokenizer(tokenizer, files["wide"])
    return {format: str(path) for format, path in files.items()}


@pytest.fixture
def make(tmp_path, trained):
    """make(format, key=value, ...): a StreamSpec of 37 small documents in that format."""

    def make(format: str, **changes: object) -> StreamSpec:
        source, reading = _write(format)
        values = {"length": 11, "packing": "crop", "objective": "causal", "seed": 5, "shuffle_buffer": 8, **changes}
        shares = {"split": None, "valid_fraction": 0.2, "test_fraction": 0.1}
        return StreamSpec(**{"sources": (str(source),), "reading": reading, **shares, **values})  # type: ignore[arg-type]

    def _write(format: str):
        reading = Reading("auto", "bytes")
        path = tmp_path / format
        if format in ("lines", "tokens", "wide"):
            path = path.with_suffix(".txt")
            path.write_text("\n".join(TEXTS))
            reading = Reading("lines", "bytes")
            if format != "lines":
                reading = Reading("lines", trained[format])
        elif format == "text":
            path = path.with_suffix(".txt")
            path.write_text("\n".join(TEXTS))
            reading = Reading("auto", "bytes", part_bytes=64)
        elif format == "jsonl":
            path = path.with_suffix(".jsonl")
            path.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
            reading = Reading("auto", "bytes", column="body")
        elif format == "parquet":
            path = path.with_suffix(".parquet")
            pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=5)
        elif format == "hub":
            path.mkdir(exist_ok=True)
            (path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
            return f"hub:{path}#train", reading
        elif format == "images":
            for i in range(37):
                folder = path / f"c{i % 3}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(folder / f"{i}.png")
            reading = Reading("auto", "pixels", image_size=2)
        else:
            path.mkdir(exist_ok=True)
            for i, text in enumerate(TEXTS):
                (path / f"{i}.txt").write_text(text)
        return path, reading

    return make


def modes(format: str) -> list[dict]:
    joined = [] if format == "images" else [{"packing": "concat"}, {"packing": "concat", "reset": True}]
    return [{"packing": "crop"}, {"packing": "crop", "crop": "first"}, *joined]
