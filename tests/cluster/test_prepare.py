"""A corpus prepared by a job on several nodes: the bytes of one machine, whichever of them is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cluster.conftest import ENDED, Login
from corpora import contents, write_files
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare

KEYS = ("memory_mb=64", "workers=1")


@pytest.fixture(scope="module")
def sources(login: Login) -> list[str]:
    return write_files(login.folder / "sources", records=6000, files=6)


def submit(login: Login, name: str, *words: str) -> str:
    said = login.type("submit", "prepare.yaml", "--job=prepare", "--site=site.yaml", f"output={name}", *KEYS, *words)
    return said.split()[1]


@pytest.fixture(scope="module")
def whole(login: Login, sources: list[str]) -> dict[str, bytes]:
    """What one process makes."""
    (login.folder / "prepare.yaml").write_text(json.dumps({"sources": sources}))
    prepare(PrepareConfig(sources, str(login.folder / "whole"), workers=1))
    return contents(login.folder / "whole")


def test_three_nodes_make_the_corpus_of_one(login: Login, whole: dict[str, bytes]) -> None:
    job = submit(login, "three", "--nodes=3")
    assert login.cluster.wait_for(job, *ENDED) == "COMPLETED", log(login, job)
    assert contents(login.folder / "three") == whole
    again = submit(login, "three", "--nodes=2")  # nothing is left to do, and nobody waits
    assert login.cluster.wait_for(again, *ENDED, timeout=60) == "COMPLETED", log(login, again)
    assert "It was there already" in log(login, again)
    assert not list(login.folder.glob(".three*"))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["map", "shards"])
def test_a_node_lost_in_a_stage_changes_nothing(login: Login, tmp_path: Path, stage: str) -> None:
    if not login.cluster.netns:
        pytest.skip("only where nodes have processes of their own")
    large = write_files(tmp_path / "large", records=300_000, files=9, seed=3)
    (login.folder / "prepare.yaml").write_text(json.dumps({"sources": large}))
    prepare(PrepareConfig(large, str(tmp_path / "whole"), workers=1))
    job = submit(login, f"lost-{stage}", "--nodes=3")
    parts = login.folder / f"lost-{stage}.partial" / "parts" / stage
    deadline = time.monotonic() + 120
    while not any(parts.glob("[0-9]*")):
        assert time.monotonic() < deadline, log(login, job)
        time.sleep(0.02)
    login.cluster.kill_node("node3")
    try:
        assert login.cluster.wait_for(job, *ENDED, timeout=300) == "COMPLETED", log(login, job)
        assert contents(login.folder / f"lost-{stage}") == contents(tmp_path / "whole")
    finally:
        login.cluster.start_node("node3")
        login.cluster.wait_until_idle(timeout=90)


def log(login: Login, job: str) -> str:
    return (login.folder / f"prepare-prepare-{job}.log").read_text()
