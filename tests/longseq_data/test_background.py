"""The processes that prepare batches: started anew, deaf to signals for their parent, and gone when it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from longseq_data.errors import DataError
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.samples.batches import EvaluationBatches, Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec

# A script without `if __name__ == "__main__":`, as people write them; argv: data, what to do.
SCRIPT = """
import os, signal, sys, threading
from itertools import islice
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.streaming import StreamSpec

got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(number))
spec = StreamSpec((sys.argv[1],), None, 0.0, 0.0, 32, "concat", "causal", 0)
batches = iter(Loader(TrainingBatches(spec, batch_sequences=4, accumulate=1, rank=0, world=1), 2))
next(batches)
if sys.argv[2] == "wait":
    print("ready", flush=True)
    signal.pause()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    os.killpg(0, number)
rest = list(islice(batches, 60))  # more than lay ready
print(sorted(got) == [2, 10, 12, 15], len(rest), flush=True)
"""


def children(pid: int) -> list[int]:
    return [int(line) for line in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def started(folder: Path, what: str) -> subprocess.Popen[str]:
    (folder / "pickle.py").write_text("raise SystemExit('the working directory is no place for modules')")
    (folder / "script").mkdir()
    (folder / "script" / "plain.py").write_text(SCRIPT)
    (folder / "p.fasta").write_text("".join(f">r{i}\n{'ACDEFGHIK' * (1 + i % 5)}\n" for i in range(300)))
    return subprocess.Popen(
        [sys.executable, "script/plain.py", "p.fasta", what],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_signals_to_all_processes_of_a_job_are_the_parents_alone(tmp_path):
    out, errors = started(tmp_path, "signal").communicate(timeout=120)
    assert out == "True 60\n", errors
    assert errors == ""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = started(tmp_path, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and "work()" in command_of(pid) for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert process.communicate()[1] == ""


def test_a_process_with_threads_is_not_forked(make_spec):
    ready = threading.Event()
    threading.Thread(target=ready.wait, daemon=True).start()
    before = set(children(os.getpid()))
    batches = iter(Loader(TrainingBatches(make_spec(), batch_sequences=2, accumulate=1, rank=0, world=1), 2))
    next(batches)
    workers = set(children(os.getpid())) - before
    ready.set()
    assert len(workers) == 2
    for pid in workers:
        assert "longseq_data.samples.background" in command_of(pid)
        assert not any("libtorch" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    batches.close()
    assert set(children(os.getpid())) & workers == set()


@pytest.mark.parametrize("packing", ["concat", "crop", "bucket"])
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_of_a_corpus_are_those_of_this_process(packing, workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    rows = [rng.choice(letters, rng.integers(5, 90)).tobytes().decode() for _ in range(200)]
    Path("p.fasta").write_text("".join(f">r{i}\n{row}\n" for i, row in enumerate(rows)))
    prepare(PrepareConfig(sources=["p.fasta"], output="corpus", workers=1))
    spec = CorpusSpec("corpus", "train", 48, packing, "masked", 5, batch_tokens=600)
    batches = TrainingBatches(spec, batch_sequences=4, accumulate=2, rank=1, world=2, start=0)
    for mine, theirs in zip(islice(Loader(batches, 0), 20), islice(Loader(batches, workers), 20), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_kept_workers_give_every_pass_and_one_that_was_left_half_way_begins_anew(make_spec):
    batches = EvaluationBatches(make_spec(), batch_sequences=3, rank=0, world=1)
    expected = [batch["tokens"].tolist() for batch in Loader(batches, 0)]
    loader = Loader(batches, 2, persistent=True)
    before = set(children(os.getpid()))
    seen = []
    for _ in range(2):
        assert [batch["tokens"].tolist() for batch in loader] == expected
        seen.append(set(children(os.getpid())) - before)
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
    half = iter(loader)
    assert next(half)["tokens"].tolist() == expected[0]
    half.close()
    assert set(children(os.getpid())) & seen[0] == set()
    assert [batch["tokens"].tolist() for batch in loader] == expected
    del loader
    assert set(children(os.getpid())) == before


def test_a_killed_worker_is_said(make_spec):
    before = set(children(os.getpid()))
    batches = iter(Loader(TrainingBatches(make_spec(), batch_sequences=2, accumulate=1, rank=0, world=1), 1))
    next(batches)
    (worker,) = set(children(os.getpid())) - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^A process that prepares batches was killed by signal 9; if memory "):
        list(islice(batches, 1000))


def test_what_fails_in_a_worker_is_raised_as_it_is(make_spec):
    spec = make_spec(split=None)
    object.__setattr__(spec, "shuffle_buffer", "many")  # a fault of a program, not of data
    with pytest.raises(TypeError) as caught:
        next(iter(Loader(TrainingBatches(spec, batch_sequences=1, accumulate=1, rank=0, world=1), 1)))
    assert "in training" in "".join(caught.value.__notes__)


def test_warnings_of_a_worker_are_logged_here_once(make_spec, write, caplog):
    spec = make_spec(sources=(write("a.fasta", ">a\nAJ\n"),), split=None)
    loader = Loader(TrainingBatches(spec, batch_sequences=1, accumulate=1, rank=0, world=1), 2)
    list(islice(loader, 4))
    assert len(caplog.messages) == 1
    assert "J" in caplog.messages[0]


def test_a_corpus_that_is_gone_is_said_by_its_workers(tmp_path):
    spec = CorpusSpec(str(tmp_path / "gone"), "train", 48, "concat", "causal", 5)
    said = []
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            next(iter(Loader(TrainingBatches(spec, batch_sequences=4, accumulate=1, rank=0, world=1), workers)))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "gone" in said[0]
