"""Corpora and preparations of the version before, whose identifiers decided the splits, stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpora import by_id, by_sequence, config, contents, expected, found, write_files
from longseq_data.errors import DataError
from longseq_data.prepare import prepare as preparing
from longseq_data.prepare.config import ADDED
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.verify import verify


def as_before(path: Path) -> None:
    """Take out of a JSON file the keys that the version before did not have."""
    values = json.loads(path.read_text())
    for key in ADDED:
        del values["settings"][key]
    path.write_text(json.dumps(values, indent=1) + "\n")


def test_the_split_of_a_corpus_is_that_of_the_sequences_or_of_the_ids(tmp_path):
    names = write_files(tmp_path / "files", records=2000)
    prepare(config(names, tmp_path / "new"))
    prepare(config(names, tmp_path / "old", split_by="id"))
    assert found(tmp_path / "new") == expected(names, split=by_sequence)
    assert found(tmp_path / "old") == expected(names, split=by_id)
    assert found(tmp_path / "new")["valid"] != found(tmp_path / "old")["valid"]


def test_a_corpus_of_the_version_before_is_verified_and_not_made_again(tmp_path):
    names = write_files(tmp_path / "files", records=2000)
    prepare(config(names, tmp_path / "c", split_by="id"))
    as_before(tmp_path / "c" / "manifest.json")
    before = contents(tmp_path / "c")
    manifest, new = prepare(config(names, tmp_path / "c"))
    assert not new
    assert "split_by" not in manifest.settings
    assert contents(tmp_path / "c") == before
    assert verify(tmp_path / "c", full=True).records == len(
        [row for rows in found(tmp_path / "c").values() for row in rows]
    )
    with pytest.raises(DataError, match='split_by was "id" and is "sequence"'):
        prepare(config(names, tmp_path / "c", split_by="sequence"))
    manifest, new = prepare(config(names, tmp_path / "c"), overwrite=True)
    assert new
    assert manifest.settings["split_by"] == "sequence"


def test_an_unfinished_preparation_of_the_version_before_keeps_its_splits(tmp_path, monkeypatch):
    names = write_files(tmp_path / "files", records=2000)
    with monkeypatch.context() as broken:
        broken.setattr(preparing, "reduce_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config(names, tmp_path / "c", split_by="id"))
    as_before(tmp_path / "c.partial" / "parts" / "plan.json")
    manifest, _ = prepare(config(names, tmp_path / "c"))
    assert found(tmp_path / "c") == expected(names, split=by_id)
    assert manifest.settings.get("split_by", "id") == "id"
