"""SIGKILLs while files are read: of the process that parses, of those that prepare batches, of whole ranks.

Sources come slowly over HTTP, so that most kills hit an ingest that is under way. Each life has another number of ranks
and workers, and a cache that is there in parts, was removed, or is the ring of data.cache=none.
``LONGSEQ_KILLS=10 pytest -m long tests/longseq_data/test_kills.py`` takes fewer.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import psutil
import pytest

from ingesting import fasta, spec_of
from longseq_data.ingest.ring import Ring
from longseq_data.samples.rank_share import Share
from longseq_data.samples.streaming import StreamSpec

pytestmark = pytest.mark.long

KILLS = int(os.environ.get("LONGSEQ_KILLS", "50"))
SEED = os.environ.get("LONGSEQ_KILLS_SEED", "0")
GROUP, STEPS = 16, 6000  # samples of a step, and steps of two epochs or so

# A rank without a model: what it gets, step by step, as hashes of rows.
RANK = """
import json, pickle, sys
from hashlib import sha256
from longseq_data.samples.batches import Loader, TrainingBatches
spec, workers, notes, last, place = pickle.load(sys.stdin.buffer)
batches = TrainingBatches(spec, accumulate=1, **place)
with open(notes, "w") as file:
    for batch in Loader(batches, workers):
        rows = zip(batch["tokens"].numpy().astype("<i4"), batch["targets"].numpy().astype("<i4"))
        mine = [sha256(tokens.tobytes() + targets.tobytes()).hexdigest()[:16] for tokens, targets in rows]
        file.write(json.dumps([int(batch["samples"]), mine]) + "\\n")
        file.flush()
        if batch["samples"] >= last:
            break
"""


def rows_of(spec: StreamSpec) -> list[list[str]]:
    """Of one process that was never killed."""
    steps = (make() for make in islice(spec.training(0, Share(GROUP, 1, 0, 1)), STEPS))
    return [
        [
            sha256(tokens.astype("<i4").tobytes() + targets.astype("<i4").tobytes()).hexdigest()[:16]
            for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True)
        ]
        for batch in steps
    ]


def begun(spec: StreamSpec, notes: Path, world: int, workers: int, start: int) -> list[subprocess.Popen[bytes]]:
    ranks = []
    for rank in range(world):
        place = {"batch_sequences": GROUP // world, "rank": rank, "world": world, "start": start}
        process = subprocess.Popen([sys.executable, "-c", RANK], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((spec, workers, str(notes / str(rank)), GROUP * STEPS, place)))
        process.stdin.close()
        ranks.append(process)
    return ranks


def noted(notes: Path, world: int, expected: list[list[str]], start: int) -> int:
    """Check all that the ranks have had; the samples of the steps that every one has had."""
    done = []
    for rank in range(world):
        path, reached = notes / str(rank), start
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                samples, mine = json.loads(line)
            except ValueError:
                break  # half a line
            assert samples == reached + GROUP
            assert mine == expected[reached // GROUP][rank::world], (rank, world, samples)
            reached = samples
        path.unlink(missing_ok=True)
        done.append(reached)
    return min(done)


def kinds(ranks: list[subprocess.Popen[bytes]]) -> dict[str, list[int]]:
    """The processes that may be killed."""
    found: dict[str, list[int]] = {"rank": [rank.pid for rank in ranks if rank.poll() is None]}
    for pid in found["rank"]:
        try:
            below = psutil.Process(pid).children(recursive=True)
            for child in below:
                words = " ".join(child.cmdline())
                for kind in ("ingest.process", "ingest.ring", "samples.background"):
                    if kind in words:
                        found.setdefault(kind, []).append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_killed_while_files_are_read_the_rows_are_those_of_one_life(write, tmp_path, counted, monkeypatch) -> None:
    address, _, handler = counted
    scratch, cache, notes = (tmp_path / name for name in ("scratch", "cache", "notes"))
    for folder in (scratch, notes):
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    for i in range(20):
        write(f"{i}.fasta.gz", gzip.compress(fasta(str(i), 700, i), 1))
    sources = [f"{address}/{i}.fasta.gz" for i in range(20)]
    local = spec_of(*(str(tmp_path / f"{i}.fasta.gz") for i in range(20)), packing="concat", split=None, seed=5)
    spec = replace(local, sources=tuple(sources))
    expected = rows_of(replace(local, sources=spec.sources))
    handler.pause = 0.05  # 100 KiB each, in pieces of 16
    draw, killed, samples, lives = random.Random(SEED), Counter[str](), 0, 0
    while killed.total() < KILLS:
        lives += 1
        if samples >= GROUP * (STEPS - 2000):
            samples = draw.randrange(0, 50) * GROUP  # on to the next run
        world, workers = draw.choice([1, 2, 4]), draw.choice([0, 1, 2])
        way = draw.choice(["kept", "kept", "removed", "ring"])
        if way == "removed":
            shutil.rmtree(cache, ignore_errors=True)
        with_ring = {"ring": Ring("run", 1 << draw.randint(18, 24))}
        life = replace(spec, **(with_ring if way == "ring" else {"cache": str(cache)}))
        ranks = begun(life, notes, world, workers, samples)
        deadline = time.monotonic() + 120
        while len(kinds(ranks)) < 2 and not (notes / "0").exists() and any(rank.poll() is None for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(draw.randint(1, 3)):
            time.sleep(draw.random())
            there = kinds(ranks)
            alive = [kind for kind in there if there[kind]]
            reading = [kind for kind in alive if kind.startswith("ingest")]
            kind = draw.choice([*alive, *3 * reading] or ["none"])
            if kind == "none":
                break
            try:
                os.kill(draw.choice(there[kind]), signal.SIGKILL)
                killed[kind] += 1
            except ProcessLookupError:
                continue
            if kind != "ingest.process" and kind != "ingest.ring":
                break  # a job ends with any of its ranks
            time.sleep(1.0)
            assert all(rank.poll() in (None, 0) for rank in ranks), "a rank ended with the process that reads"
        for rank in ranks:
            rank.kill()
            rank.wait()
        samples = noted(notes, world, expected, samples)
    print(f"{dict(killed)} in {lives} lives")
    handler.pause = 0.0
    for life in (replace(spec, cache=str(cache)), replace(spec, ring=Ring("run", 1 << 20))):
        ranks = begun(life, notes, 2, 1, samples)
        assert [rank.wait(600) for rank in ranks] == [0, 0]
        assert noted(notes, 2, expected, samples) == GROUP * STEPS
