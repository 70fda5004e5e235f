"""The nodes of a job: what one process finds, bit for bit, and nothing of it twice after a requeue."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest

import longseq as api
from longseq.errors import LongseqError
from longseq.evaluation import nodes as of_nodes
from longseq.evaluation import shards
from longseq.evaluation.nodes import Nodes, help_out
from longseq.evaluation.shards import Job, take_part
from longseq.evaluation.work import Scores, work_of
from longseq.launch.workers import Workers


@pytest.fixture
def job(folder, monkeypatch):
    """Two nodes of two processes each, as the first one's verb knows them; every process does its share at once."""
    nodes = Nodes(str(folder / "job.shards"), 2, "7.0.0")
    monkeypatch.setenv("LONGSEQ_NODES", json.dumps(asdict(nodes)))
    monkeypatch.setattr(shards, "Workers", Both)
    monkeypatch.setattr(of_nodes, "Workers", Own)
    return nodes


class Own(Workers):
    """A node's processes."""

    def __enter__(self):
        for rank in range(self.first, self.first + self.devices):
            take_part(self.place, rank, self.world, work_of(Job.read(self.place)))
        return self

    def lost(self, done=None):
        return {}

    def ended(self):
        return True


class Both(Own):
    """Those of the first node, after another node's, which has begun when it was told to."""

    def __enter__(self):
        help_out(Nodes.here(), 1, self.devices)
        return super().__enter__()


@pytest.fixture
def files(folder):
    rng = random.Random(2)
    records = [f">r{i}\n{''.join(rng.choices('ACDEFGHIK', k=900 + i))}\n" for i in range(40)]
    (folder / "many.fasta").write_text("".join(records))
    (folder / "wild.fasta").write_text(">wild\n" + "MKVLAACDEF" * 9 + "\n")
    chains = ({"id": f"c{i}", "sequence": "".join(rng.choices("ACDEFGHIK", k=20 + i))} for i in range(6))
    rows = [
        {**chain, "contacts": [[0, 8], [2, 12]], "secondary_structure": ("HE-" * 9)[: len(chain["sequence"])]}
        for chain in chains
    ]
    (folder / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_nodes_find_what_one_process_finds(trained, files, folder, job, monkeypatch, objective):
    run = trained("one", f"model.objective={objective}")
    calls = (
        lambda **how: list(api.score(run, "many.fasta", passes=20 * (objective == "masked"), **how)),
        lambda **how: list(api.variant_effects(run, "wild.fasta", ["M1A", "K2C:V3D", "K2D"], **how)),
        lambda **how: [each.residues.tobytes() for each in api.embed(run, "many.fasta", **how)],
        lambda **how: api.benchmark_contacts("chains.jsonl", run, train=3, **how).as_dict(),
        lambda **how: api.benchmark_structure("chains.jsonl", [run, run], train=3, **how).as_dict(),
    )
    of_job = [call(devices=2) for call in calls]
    assert list((folder / "job.shards").glob("*.shard"))  # until the verb has ended well
    monkeypatch.delenv("LONGSEQ_NODES")
    assert [call() for call in calls] == of_job
    monkeypatch.setattr(shards, "Workers", Own)
    assert [call(devices=3) for call in calls[-2:]] == of_job[-2:]


def test_a_requeued_job_does_what_was_not_finished(trained, files, folder, job, monkeypatch, capsys):
    run, seen, own = trained(), [], Scores.rows

    def rows(self, group, stop=7):
        if stop and len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(group[0].identifier)
        return own(self, group)

    monkeypatch.setattr(Scores, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        list(api.score(run, "many.fasta"))
    finished = len(list((folder / "job.shards").glob("*.shard")))
    assert finished == len(seen) == 7
    monkeypatch.setattr(Scores, "rows", lambda self, group: rows(self, group, stop=0))
    found = list(api.score(run, "many.fasta"))
    assert "going on behind 7 shards" in capsys.readouterr().err
    assert len(seen) == len(set(seen)) == 10
    monkeypatch.delenv("LONGSEQ_NODES")
    assert found == list(api.score(run, "many.fasta"))


def test_another_start_of_the_job_is_none_to_help(job, folder):
    (folder / "job.shards").mkdir()
    Nodes(job.folder, 2, "7.0.1").begin()
    assert not job.begun()
    job.begin()
    assert job.begun()


def test_a_lock_that_a_lost_node_has_is_waited_for(trained, files, folder, job, monkeypatch):
    monkeypatch.setattr(shards, "_PATIENCE", 0.1)
    scores = api.score(trained(), "many.fasta")
    (folder / "job.shards").mkdir()
    with (folder / "job.shards" / ".lock").open("a") as file:
        shards.lock(file, folder)
        with pytest.raises(LongseqError, match="another process writes there; wait for it"):
            list(scores)


def test_each_process_of_each_node_has_a_rank_and_a_device_of_its_own(folder, monkeypatch):
    told = []
    monkeypatch.setattr("subprocess.Popen", lambda command, env, **_: told.append(env))
    workers = Workers("longseq.evaluation.worker", folder, 2, node=1, nodes=3)
    for local in range(2):
        workers._started(local)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [[env[name] for name in names] for env in told] == [["2", "6", "0", "2"], ["3", "6", "1", "2"]]
    workers._end()
