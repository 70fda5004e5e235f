"""Embeddings by a job on two nodes: the bytes of one process, whatever is killed."""

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


def test_a_killed_process_of_two_nodes_costs_its_shard(login: Login, here: Callable[..., Path]) -> None:
    run = here("vectors", "trainer.max_steps=1", "trainer.valid_every=0")
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


def refused(login: Login, *words: object) -> str:
    ended = longseq(*words, folder=login.folder, inside=login.cluster.command(), environment=login.cluster.environment)
    assert ended.code == 1, ended.out
    return ended.err
