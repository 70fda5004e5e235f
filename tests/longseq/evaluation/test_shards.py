"""Records in shards: the same results whoever computes them, and none of them twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

import longseq as api
from command_line import Command, alive
from command_line import longseq as typed
from longseq.cli import main
from longseq.errors import LongseqError, PassingError
from longseq.evaluation import shards
from longseq.evaluation.embed import embedding
from longseq.evaluation.shards import Job, kept, results, take_part
from longseq.evaluation.tally import Tally
from longseq.evaluation.vector_options import Wanted
from longseq.evaluation.vector_work import Vectors
from longseq.evaluation.work import Scores, work_of
from longseq.launch.workers import Workers
from longseq.runs import starts
from longseq.trained_model import find
from longseq_data.errors import DataError


@pytest.fixture
def many(folder):
    """60 records in 15 batches, some of them of one name."""
    rng = random.Random(2)
    names = ["same" if i % 7 == 0 else f"r{i}" for i in range(60)]
    records = (f">{name}\n{''.join(rng.choices('ACDEFGHIK', k=900 + i))}\n" for i, name in enumerate(names))
    (folder / "many.fasta").write_text("".join(records))
    return folder / "many.fasta"


def computed(monkeypatch, stop=None):
    """The batches of vectors that are computed, by the first record's length; after ``stop`` of them Ctrl-C."""
    seen, own = [], Vectors.rows

    def rows(self, group):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(group[0].length)
        return own(self, group)

    monkeypatch.setattr(Vectors, "rows", rows)
    return seen


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
@pytest.mark.parametrize("residues", [[], ["--per-residue"]], ids=["means", "residues"])
def test_an_embedding_that_was_killed_goes_on_where_it_was(
    trained, longseq, many, folder, monkeypatch, suffix, residues
):
    run, words = trained(), ("embed", "many.fasta", *residues)
    longseq(words[0], run, *words[1:], "--out", f"whole.{suffix}")
    with monkeypatch.context() as patch:
        first = computed(patch, stop=8)
        assert main([words[0], str(run), *words[1:], "--out", f"out.{suffix}"]) == 130
    place = folder / f".out.{suffix}.shards"
    assert not (folder / f"out.{suffix}").exists()
    assert len(list(place.glob("*.shard"))) == len(first) == 8
    second = computed(monkeypatch)
    longseq(words[0], run, *words[1:], "--out", f"out.{suffix}")
    assert len({*first, *second}) == len([*first, *second]) > 12  # nothing twice
    assert (folder / f"out.{suffix}").read_bytes() == (folder / f"whole.{suffix}").read_bytes()
    assert not place.exists()


def test_shards_of_another_job_or_of_a_file_that_has_changed_are_not_taken(trained, longseq, many, folder, monkeypatch):
    run = trained()
    out, words = folder / ".v.npz.shards", ["embed", str(run), "many.fasta", "--out", "v.npz"]

    def stopped(*more):
        with monkeypatch.context() as patch:
            computed(patch, stop=3)
            assert main([*words, *more]) == 130
        return {path.name.partition("-")[0] for path in out.glob("*.shard")}

    (first,), (other,) = stopped(), stopped("--layer", "1")
    many.write_text(many.read_text() + ">one more\nMKV\n")
    (changed,) = stopped()
    assert len({first, other, changed}) == 3
    longseq(*words)
    with np.load(folder / "v.npz") as kept_file:
        means = np.stack([each.mean for each in api.embed(run, "many.fasta")])
        assert np.array_equal(kept_file["mean"], means)
        assert kept_file["ids"][-1] == "one"


def test_bad_data_leave_no_shards_and_a_second_process_is_refused(trained, refused, many, folder):
    run = trained()
    work = Vectors(embedding(find(run), many, (), Wanted(per_residue=False), ema=False))
    with kept(folder / ".v.npz.shards", work):
        assert "another process writes there" in refused("embed", run, "many.fasta", "--out", "v.npz")
    many.write_text(many.read_text() + ">empty\n>bad\nMK1\n")
    assert "line" in refused("embed", run, "many.fasta", "--out", "v.npz")
    assert not list(folder.glob("*v.npz*"))
    assert "does not exist" in refused("embed", run, "test.fasta", "--out", "nowhere/v.npz")


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["score", "effects", "embed", "evaluate"])
def test_processes_that_share_a_job_find_what_one_finds(trained, many, folder, kind, world):
    run = trained("one", "model.objective=masked" if kind == "effects" else "model.objective=causal")
    (folder / "wild.fasta").write_text(">wild\n" + "MKVLAACDEF" * 90 + "\n")
    options = {
        "score": {"passes": 0},
        "effects": {"variants": [f"{'MKVLAACDEF'[i % 10]}{i + 1}{'AG'[i % 2]}" for i in range(3, 43)], "table": None},
        "embed": {"layers": [None], "pool": "max", "dtype": "float16"},
        "evaluate": {
            "folders": [str(find(run).folder)] * 2,
            "parts": [str(many), "test"],
            "sequences": 900,
            "top_k": 3,
        },
    }
    file = folder / "wild.fasta" if kind == "effects" else many
    job = Job(kind, str(find(run).folder), str(file), options=options[kind])
    with kept(folder / "shards", work_of(job)):
        assert Job.read(folder / "shards") == job
        for rank in reversed(range(world)):
            take_part(folder / "shards", rank, world, work_of(Job.read(folder / "shards")))
        assert len(list((folder / "shards").glob("*.shard"))) > 6
        shared = list(results(folder / "shards", work_of(job), 1))
    alone = [row for work in [work_of(job)] for group in work.groups() for row in work.rows(group)]
    assert len(shared) == len(alone) > 30
    for one, other in zip(shared, alone, strict=True):
        assert _plain(one) == _plain(other)


def _plain(row):
    row = [*row[:2], *vars(row[2]).values()] if isinstance(row, tuple) and isinstance(row[-1], Tally) else row
    return [x.tobytes() if isinstance(x, np.ndarray) else x for x in row] if isinstance(row, (list, tuple)) else row


def test_shards_grow_so_that_large_files_make_few(monkeypatch):
    monkeypatch.setattr(shards, "_GROWS_EVERY", 3)
    monkeypatch.setattr(shards, "_LARGEST", 4)
    work = object.__new__(Scores)
    monkeypatch.setattr(Scores, "groups", lambda self: iter(range(31)))
    assert [len(each) for each in shards._shards(work)] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 4, 4, 2]
    monkeypatch.setattr(Scores, "grows", False)
    assert [len(each) for each in shards._shards(work)] == [1] * 31


class Lost(Workers):
    """Processes that are killed as soon as they are started."""

    def _started(self, rank):
        process = subprocess.Popen(["sh", "-c", "kill -9 $$"])
        process.wait()
        return process


def test_a_process_that_is_lost_over_and_over_is_an_error(trained, many, folder, monkeypatch, capsys):
    monkeypatch.setattr(shards, "Workers", Lost)
    work = Scores(Job("score", str(find(trained()).folder), str(many), options={"passes": 0}))
    with kept(folder / "shards", work):
        with pytest.raises(LongseqError, match=r"process 0 of 2 was killed by signal 9, for the third time"):
            list(results(folder / "shards", work, 2))
        assert "process 0 of 2 was killed by signal 9: its shard is done again" in capsys.readouterr().err


class Dying(Workers):
    """The second process is lost whenever somebody looks."""

    def lost(self):
        return {1: "was killed by signal 9"}

    def start_again(self, rank):
        pass


@pytest.mark.parametrize("job", [True, False])
def test_losses_far_apart_are_no_error(folder, monkeypatch, job):
    monkeypatch.delenv(starts.OWN, raising=False)
    if job:
        monkeypatch.setenv(starts.OWN, str(folder / "embed-7.fence/00001.start"))
    workers, losses = Dying("none", folder, 2), {}
    for number in range(6):
        (folder / f"mark-{2 * number + 1:06}.shard").touch()
        shards.replace_lost(workers, losses)
    (folder / "mark-000000.shard").touch()  # another's
    shards.replace_lost(workers, losses)
    with pytest.raises(LongseqError, match="for the third time") as error:
        shards.replace_lost(workers, losses)
    assert error.value.exit_code == (70 if job else 1)


TELLS = """
import errno, os, sys
from longseq.launch.workers import serve
from longseq_data.errors import DataError
def work(place, rank, world):
    if place.name == "data":
        raise DataError("a.fasta, line 3: bad.")
    number = errno.ESTALE if place.name == "stale" else errno.ENOSPC
    raise OSError(number, os.strerror(number))
sys.exit(serve(work))
"""


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("data", DataError, "line 3: bad."),
        ("full", LongseqError, "full: No space left on device; make room"),
        ("stale", PassingError, "stale: Stale file handle"),
    ],
)
def test_what_a_process_says_needs_no_disk(folder, monkeypatch, name, kind, sentence):
    (folder / "tells.py").write_text(TELLS)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    with Workers("tells", folder / name, 1) as workers:
        workers.processes[0].wait()
        with pytest.raises(kind, match=sentence):
            workers.lost()
    assert not (folder / name).exists()
    assert not workers.pipes


class Full(Workers):
    """Each does a shard, and then the disk is full; of data that are bad the first says so."""

    kind = "other"

    def _started(self, rank):
        work = work_of(Job.read(self.place))
        shards._finish(self.place / f"{shards._mark(self.place)}-{rank:06}.shard", work, next(shards._shards(work)))
        process = subprocess.Popen(["false"])
        process.wait()
        return process

    def _said(self, rank):
        return f"{self.kind} {self.place}: No space left on device."


@pytest.mark.parametrize("kind", ["other", "data"])
def test_shards_outlive_a_full_disk_and_not_bad_data(trained, refused, many, folder, monkeypatch, kind):
    monkeypatch.setattr(shards, "Workers", Full)
    monkeypatch.setattr(Full, "kind", kind)
    words = ("embed", trained(), "many.fasta", "--out", "v.npz")
    assert "No space left on device." in refused(*words, "--devices", "2")
    assert len(list(folder.glob(".v.npz.shards/*.shard"))) == (2 if kind == "other" else 0)


def test_a_process_of_an_earlier_job_adds_nothing_to_a_later_one(trained, many, folder, monkeypatch):
    """It lives for a second after its command was killed, in which another may have begun there."""
    place, own = folder / "shards", Vectors.rows
    work = Vectors(embedding(find(trained()), many, (), Wanted(per_residue=False), ema=False))

    def rows(self, group):
        if len(list(place.glob("*.shard"))) == 3:
            (place / shards.JOB).write_text("another job")
        return own(self, group)

    monkeypatch.setattr(Vectors, "rows", rows)
    with kept(place, work):
        mark = shards._mark(place)
        take_part(place, 0, 1, work)
        assert shards._mark(place) != mark
        names = sorted(path.name for path in place.iterdir() if path.name not in (shards.JOB, shards._LOCK))
        assert len(names) > 12
        assert {name[:12] for name in names} == {mark}


class Here(Workers):
    """Processes that are none: each does its share at once, the last one first."""

    def __enter__(self):
        for rank in reversed(range(self.world)):
            take_part(self.place, rank, self.world, work_of(Job.read(self.place)))
        return self

    def lost(self, done=None):
        return {}


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_scores_and_effects_are_the_same_for_any_number_of_devices(trained, many, folder, monkeypatch, objective):
    run = trained("one", f"model.objective={objective}")
    (folder / "wild.fasta").write_text(">wild\n" + "MKVLAACDEF" * 30 + "\n")
    variants = ["M1A", "K2C:V3D", "K2D", "M1C"]
    records = many if objective == "causal" else "test.fasta"
    calls = (
        lambda devices: list(api.score(run, records, devices=devices)),
        lambda devices: list(api.variant_effects(run, "wild.fasta", variants, devices=devices)),
        lambda devices: [each.mean.tobytes() for each in api.embed(run, "test.fasta", devices=devices)],
    )
    alone = [call(1) for call in calls]
    monkeypatch.setattr(shards, "Workers", Here)
    assert [call(3) for call in calls] == alone
    assert [each.variant for each in alone[1]] == variants
    with pytest.raises(LongseqError, match="devices=0: take 1 or more"):
        api.score(run, records, devices=0)


def test_what_is_read_behind_a_context_is_the_same_for_any_number_of_devices(trained, folder, monkeypatch):
    run = trained("one", "model.objective=causal", "attention.window=5", "attention.forget_gate=true")
    (folder / "wild.fasta").write_text(">wild\nMKVLAACDEF\n")
    (folder / "own relatives.a3m").write_text("#1\t1\n>a\nMKVL--CDEF\n>b\nMKvlVLAA.C\n>c\nACDEF\n")
    behind = {"context": "own relatives.a3m", "context_tokens": 20, "context_orders": 4}
    calls = (
        lambda devices, **how: [each.log_likelihood for each in api.score(run, "test.fasta", devices=devices, **how)],
        lambda devices, **how: [
            each.effect for each in api.variant_effects(run, "wild.fasta", ["M1A", "K2C:V3D"], devices=devices, **how)
        ],
    )
    alone, bare = ([call(1, **how) for call in calls] for how in (behind, {}))
    monkeypatch.setattr(shards, "Workers", Here)
    assert [call(3, **behind) for call in calls] == alone
    assert all(
        one != other
        for ours, without in zip(alone, bare, strict=True)
        for one, other in zip(ours, without, strict=True)
    )


@pytest.mark.distributed
def test_killed_processes_cost_their_shards_and_a_killed_start_nothing(trained, folder):
    """One of two processes is killed, and then all: what goes on, with one process, writes the same bytes."""
    rng = random.Random(4)
    records = (f">r{i}\n{''.join(rng.choices('ACDEFGHIK', k=2100))}\n" for i in range(220))
    (folder / "many.fasta").write_text("".join(records))
    run, place = trained("one", "model.dim=64", "model.depth=4"), folder / ".two.parquet.shards"
    command = Command("embed", run, "many.fasta", "--out", "two.parquet", "--devices", 2, folder=folder)
    while not list(place.glob("*.shard")):
        assert command.process.poll() is None
        time.sleep(0.01)
    workers = command.workers()
    command.kill(workers[0])
    command.wait_for("was killed by signal 9: its shard is done again")
    while len(workers := command.workers()) < 2:
        time.sleep(0.01)
    command.kill(command.process.pid)
    command.process.wait()
    while any(map(alive, workers)):
        time.sleep(0.05)
    there = list(place.glob("*.shard"))
    assert 0 < len(there) < 80
    ended = typed("embed", run, "many.fasta", "--out", "two.parquet", folder=folder)
    assert ended.code == 0, ended.err
    assert f"going on behind {len(there)} shards" in ended.err
    assert typed("embed", run, "many.fasta", "--out", "one.parquet", folder=folder).code == 0
    assert (folder / "two.parquet").read_bytes() == (folder / "one.parquet").read_bytes()
    assert not place.exists()


def test_who_deals_out_embeddings_begins_without_torch():
    """It would be imported once more before the processes that need it are started."""
    program = (
        "import sys, longseq.evaluation.embed, longseq.evaluation.embedding_files, longseq.evaluation.vector_work\n"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr
