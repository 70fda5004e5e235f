"""The nodes of a job: what one process finds, bit for bit, and nothing of it twice after a requeue."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import pytest

import longseq as api
from longseq import output_files
from longseq.cli import main
from longseq.errors import LongseqError, PassingError, SupersededError
from longseq.evaluation import nodes as of_nodes
from longseq.evaluation import shards, worker
from longseq.evaluation.nodes import Nodes, help_out
from longseq.evaluation.shards import Job, take_part
from longseq.evaluation.work import Scores, work_of
from longseq.launch.workers import Workers
from longseq.runs import starts
from longseq_data.errors import DataError
from longseq_data.files import aside


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


def test_results_that_cannot_be_written_at_the_end_cost_no_shard(trained, files, folder, job, monkeypatch, capsys):
    """A disk that is full as the last row is written."""
    run, words = str(trained()), ["many.fasta", "--devices", "2", "--out", "scores.tsv"]

    @contextmanager
    def full(path):
        with aside(path) as partial:
            yield partial
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(output_files, "aside", full)
        assert main(["score", run, *words]) == 1
    assert not (folder / "scores.tsv").exists()
    monkeypatch.setattr(Scores, "rows", lambda *_: pytest.fail("computed twice"))
    assert main(["score", run, *words]) == 0
    assert "going on behind 10 shards" in capsys.readouterr().err
    assert len((folder / "scores.tsv").read_text().splitlines()) == 41


@pytest.fixture
def own(folder, monkeypatch):
    """The folder of a job's starts, of which this process has the first."""
    starts.take(folder / "embed-7.fence", "slurm job 7")
    monkeypatch.setenv(starts.OWN, str(folder / "embed-7.fence/00001.start"))
    return folder / "embed-7.fence"


def test_an_old_start_leaves_the_shards_of_the_new_one_alone(trained, files, folder, job, own):
    work, place = work_of(Job("score", str(trained()), "many.fasta", options={"passes": 0})), folder / "job.shards"
    with pytest.raises(LongseqError, match="fails"), shards.kept(place, work):
        raise LongseqError("fails before any shard is finished, and nothing is left")
    assert not place.exists()
    with pytest.raises(LongseqError, match="fails"), shards.kept(place, work):
        follow_and_fail(own)
    assert (place / shards.JOB).exists()
    (place / "other-000000.shard").touch()
    with pytest.raises(SupersededError), shards.kept(place, work):
        pytest.fail("an old start has begun")
    assert (place / "other-000000.shard").exists()


@pytest.mark.parametrize("changed", ["many.fasta", "variants.csv", "relatives.a3m"])
def test_shards_are_of_the_tables_and_relatives_that_were_read(trained, files, folder, job, own, changed):
    for name in ("variants.csv", "relatives.a3m"):
        (folder / name).write_text("as it was\n")
    options = {"passes": 0, "variants": [], "table": "variants.csv", "context": ["relatives.a3m", 100, 1]}
    work, place = work_of(Job("score", str(trained()), "many.fasta", options=options)), folder / "job.shards"
    left = []
    for _ in range(3):
        with pytest.raises(PassingError), shards.kept(place, work):
            lose_a_node(place, left)
        if len(left) == 2:
            (folder / changed).write_text((folder / changed).read_text() + ">another\nMK\n")
    assert left == [0, 1, 0]


def lose_a_node(place, left):
    """Behind one more shard; ``left``: gets how many there were."""
    left.append(len(list(place.glob("*.shard"))))
    (place / "0-000000.shard").touch()
    raise PassingError("the node is lost")


def follow_and_fail(own):
    starts.take(own, "slurm job 7, restart 1")
    raise LongseqError("fails, but the next start is at work")


@pytest.fixture
def node(folder, own, monkeypatch):
    """node(rank, what): exit code of a node's task, and what its start's end says; a shell does ``what`` as verb."""
    (folder / "job.shards").mkdir()
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "n[1-2]", "LOCALID": "0", "STEP_NUM_TASKS": "2"}

    def node(rank, what=""):
        for name, value in {**slurm, "PROCID": str(rank)}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        (folder / "python").write_text(f"#!/bin/sh\n{what}\n")
        (folder / "python").chmod(0o755)
        monkeypatch.setattr("sys.executable", str(folder / "python"))
        monkeypatch.setattr("sys.argv", ["nodes", str(folder / "job.shards"), "4", "embed", "a.fasta"])
        monkeypatch.setattr(of_nodes, "stand", lambda: None)  # its thread would outlive the test
        return of_nodes.main(), starts.read_end(own, 1)

    return node


@pytest.mark.parametrize(
    ("what", "code", "end"),
    [
        ('[ "$*" = "-m longseq.cli embed a.fasta --devices 4" ]', 0, "finished"),
        ("exit 1", 1, "error see the job's log"),
        ("exit 2", 2, "error see the job's log"),
        ("exit 70", 70, None),
        ("exit 77", 77, None),
        ("kill -9 $$", 137, None),
    ],
)
def test_the_first_node_notes_what_ends_the_job(folder, node, what, code, end):
    assert node(0, what) == (code, end)
    assert (folder / "job.shards").exists() == (code != 0)


def test_a_first_node_that_was_only_thought_lost_removes_no_shards(folder, node, own):
    starts.take(own, "slurm job 7, restart 1")
    assert node(0, "exit 0")[0] == 0
    assert (folder / "job.shards").exists()


@pytest.mark.parametrize(
    ("error", "code", "end"),
    [
        (DataError("a.fasta, line 3: bad."), 1, "error node 1: a.fasta, line 3: bad."),
        (OSError(errno.EACCES, "Permission denied", "p"), 1, "error node 1: p: Permission denied; have its owner "),
        (OSError(errno.ESTALE, "Stale file handle", "p"), 70, None),
        (PassingError("process 2 of 4 was killed"), 70, None),
    ],
)
def test_another_node_notes_what_a_person_must_fix_and_no_more(node, monkeypatch, capsys, error, code, end):
    def help_out(*_):
        raise error

    monkeypatch.setattr(of_nodes, "help_out", help_out)
    ended, said = node(1)
    assert ended == code
    assert said == end or said.startswith(end)
    assert capsys.readouterr().err.startswith("longseq: error: node 1: ")


@pytest.mark.parametrize(("gpus", "refused"), [("1", True), (None, False)])
def test_a_node_that_shows_none_of_the_gpus_that_were_asked_for_is_refused(monkeypatch, gpus, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("LONGSEQ_GPUS", raising=False)
    if gpus:
        monkeypatch.setenv("LONGSEQ_GPUS", gpus)
    with pytest.raises(LongseqError, match=f"^{socket.gethostname()}: .*leave it out") if refused else nullcontext():
        worker._claim("auto")


@pytest.mark.parametrize("error", ["ValueError('a bug')", "OSError(116, 'Stale file handle')"])
def test_a_first_node_that_crashes_is_tried_again(folder, error):
    program = f"import sys\nfrom longseq import cli\ndef fails(args): raise {error}\n"
    program += "cli.parsed = lambda _: type('', (), {'run': fails})\nfails = staticmethod(fails)\nsys.exit(cli.main())"
    told = {"LONGSEQ_NODES": "{}", "LONGSEQ_START": str(folder / "embed-7.fence/00001.start")}
    codes = []
    for environment in (os.environ | told, os.environ):
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert "a bug" in done.stderr or "Stale" in done.stderr
        codes.append(done.returncode)
    assert codes == [70, 1]
