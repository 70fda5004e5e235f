"""The example in the README, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from corpora import write_files
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare

README = Path(__file__).parents[2] / "README.md"


def test_batches_in_plain_pytorch(tmp_path, monkeypatch):
    names = write_files(tmp_path / "files", records=200, files=1)
    prepare(PrepareConfig(sources=names, output=str(tmp_path / "data" / "uniref50"), workers=1))
    monkeypatch.chdir(tmp_path)
    (example,) = [text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "CorpusSpec" in text]
    found: dict = {}
    exec(example, found)
    assert found["tokens"].shape == found["targets"].shape
    assert found["tokens"].shape[0] == 32
    assert found["tokens"].dtype == torch.int64
    assert found["consumed"] == 32
    assert len(example.strip().splitlines()) <= 10
