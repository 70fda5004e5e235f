"""Embeddings, scores and a benchmark by jobs on two nodes: the bytes of one process, whatever is killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from command_line import longseq

from .conftest import ENDED, Login

pytestmark = pytest.mark.distributed


def workers(login: Login, node: str) -> list[int]:
    """The processes that a node's task has started."""
    found = []
    for pid in login.cluster.processes(node):
        with suppress(OSError):
            if b"longseq.evaluation.worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def run(here: Callable[..., Path]) -> Path:
    return here("vectors", "trainer.max_steps=1", "trainer.valid_every=0")


def test_a_killed_process_of_two_nodes_costs_its_shard(login: Login, run: Path) -> None:
    rng = random.Random(3)
    records = (f">r{i}\n{''.join(rng.choices('ACDEFGHIK', k=2100))}\n" for i in range(150))
    (login.folder / "long.fasta").write_text("".join(records))
    words = ("submit", run, "--job=embed", "--nodes=2", "--site=site.yaml", "--", "long.fasta", "--out=nodes.parquet")
    said = login.type(*words).split()
    job, log = said[said.index("job") + 1], login.folder / said[said.index("log") + 1]
    place = login.folder / ".nodes.parquet.shards"
    deadline = time.monotonic() + 120
    while not (there := workers(login, "node2")) or not list(place.glob("*.shard")):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(there[0], signal.SIGKILL)
    assert f"shards: job {job} (RUNNING) of " in refused(login, *words)
    assert f"embed     job {job}: RUNNING on node[1-2]" in login.type("status", run)
    assert login.cluster.wait_for(job, *ENDED) == "COMPLETED", log.read_text()
    assert "process 1 of 2 was killed by signal 9: its shard is done again" in login.type(
        "logs", run, "--job=embed", "-f"
    )
    assert longseq("embed", run, "long.fasta", "--out", "one.parquet", folder=login.folder).code == 0
    assert (login.folder / "nodes.parquet").read_bytes() == (login.folder / "one.parquet").read_bytes()
    assert not place.exists()


def test_scores_and_a_benchmark_of_two_nodes_are_those_of_one_process(login: Login, run: Path) -> None:
    wild = "MKVLAACDEFGHIKLMNPQ"
    mutants = [f"{letter}{at}{new}" for at, letter in enumerate(wild, 1) for new in "WY"]
    for name, turn in (("FIRST", 5), ("SECOND", 7)):
        rows = (f"{mutant},{number * turn % 11}\n" for number, mutant in enumerate(mutants))
        (login.folder / f"gym/{name}.csv").parent.mkdir(exist_ok=True)
        (login.folder / f"gym/{name}.csv").write_text("mutant,DMS_score\n" + "".join(rows))
    (login.folder / "gym/reference.csv").write_text(
        "DMS_id,DMS_filename,target_seq,UniProt_ID,coarse_selection_type,DMS_binarization_cutoff\n"
        + "".join(f"{name},{name}.csv,{wild},{name},Binding,5\n" for name in ("FIRST", "SECOND"))
    )
    logs = []
    for verb, *words in (("score", "proteins.fasta", "--out", "nodes.tsv"), ("benchmark", "proteingym", "gym")):
        said = login.type("submit", run, f"--job={verb}", "--nodes=2", "--site=site.yaml", "--", *words).split()
        job, log = said[said.index("job") + 1], login.folder / said[said.index("log") + 1]
        assert login.cluster.wait_for(job, *ENDED) == "COMPLETED", log.read_text()
        assert f"{verb:<9} job {job}: COMPLETED" in login.type("status", run)
        logs.append(log.read_text())
    for words in (
        ("score", run, "proteins.fasta", "--out", "one.tsv"),
        ("benchmark", "proteingym", "gym", run, "--out", "measured"),
    ):
        ended = longseq(*words, folder=login.folder)
        assert ended.code == 0, ended.err
    assert (login.folder / "nodes.tsv").read_bytes() == (login.folder / "one.tsv").read_bytes()
    assert len((login.folder / "one.tsv").read_text().splitlines()) == 201
    (kept,), (wanted,) = (
        list(place.iterdir()) for place in (run / "evaluations/proteingym", login.folder / "measured")
    )
    names = sorted(str(path.relative_to(wanted)) for path in wanted.rglob("*.csv"))
    assert len(names) == 2
    for name in names:
        assert (kept / name).read_bytes() == (wanted / name).read_bytes()
    table = [line for line in ended.out.splitlines() if "Spearman" in line or "vectors" in line]
    assert table
    assert all(line in logs[1] for line in table)


def refused(login: Login, *words: object) -> str:
    ended = longseq(*words, folder=login.folder, inside=login.cluster.command(), environment=login.cluster.environment)
    assert ended.code == 1, ended.out
    return ended.err
