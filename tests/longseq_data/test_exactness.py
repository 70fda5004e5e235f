"""The whole stream of tokens, hashed: the same for any ranks, workers and accumulation, and through kills and resumes.

``make test-long`` runs the large version of each.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import pytest

from corpora import write_files
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.corpus_samples import CorpusSpec
from longseq_data.samples.rank_share import Samples
from longseq_data.samples.streaming import StreamSpec

GROUP = 8  # sequences a step; with buckets as many as there are
WAYS = {
    "streamed": {"packing": "concat"},
    "streamed-reset": {"packing": "concat", "reset": True},
    "streamed-crop": {"packing": "crop"},
    "streamed-kept": {"packing": "concat"},
    "concat": {"packing": "concat"},
    "reset": {"packing": "concat", "reset": True},
    "crop": {"packing": "crop"},
    "bucket": {"packing": "bucket", "batch_tokens": GROUP * 64},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``files`` and ``corpus``, of 260 proteins."""
    folder = tmp_path_factory.mktemp("exactness")
    names = write_files(folder / "files", records=260, files=3)
    prepare(PrepareConfig(sources=names, output=str(folder / "corpus"), workers=1))
    return folder


def spec_of(place: Path, way: str, objective: str) -> Samples:
    settings = {"length": 64, "objective": objective, "seed": 11, **WAYS[way]}
    if way.startswith("streamed"):
        sources = tuple(sorted(map(str, (place / "files").iterdir())))
        if way == "streamed-kept":
            settings |= {"cache": str(place / "cache"), "later_epochs": "permutation"}
        return StreamSpec(sources, "train", valid_fraction=0.05, test_fraction=0.05, shuffle_buffer=50, **settings)
    return CorpusSpec(str(place / "corpus"), "train", **settings)


def steps(
    spec: Samples, *, world: int, workers: int, accumulate: int = 1, start: int = 0
) -> Iterator[tuple[int, list[bytes]]]:
    """(samples consumed, the samples in their global order) of each step, put together from all ranks."""
    loaders = [
        Loader(
            TrainingBatches(
                spec,
                batch_sequences=GROUP // world // accumulate,
                accumulate=accumulate,
                rank=rank,
                world=world,
                start=start,
            ),
            workers,
        )
        for rank in range(world)
    ]
    ranks = [iter(loader) for loader in loaders]
    while True:
        rows: list[list[bytes]] = []
        for rank in ranks:
            batches = list(islice(rank, accumulate))
            mine = [list(_rows(batch, spec.vocabulary.pad)) for batch in batches]
            if getattr(spec, "packing", None) == "bucket":  # dealt out one by one, else in pieces
                mine = [[row[i] for row in mine if i < len(row)] for i in range(max(map(len, mine)))]
            rows.append([row for batch in mine for row in batch])
            consumed = int(batches[-1]["samples"])
        yield consumed, [row[i] for i in range(max(map(len, rows))) for row in rows if i < len(row)]


def _rows(batch, pad: int) -> Iterator[bytes]:
    for i in range(len(batch["tokens"])):
        real = batch["tokens"][i] != pad
        if real.any():
            names = [name for name in ("tokens", "targets", "segments") if name in batch]
            yield b"".join(batch[name][i][real].numpy().astype("<i4").tobytes() for name in names)


def stream(spec: Samples, samples: int, **shape: int) -> tuple[str, Counter[bytes]]:
    """The hash of everything up to the step that reaches ``samples``, and the multiset of samples."""
    digest, seen = hashlib.sha256(), Counter()
    with closing(steps(spec, **shape)) as endless:
        for consumed, rows in endless:
            for row in rows:
                digest.update(len(row).to_bytes(4, "little") + row)
            seen.update(rows)
            if consumed >= samples:
                return digest.hexdigest(), seen
    raise AssertionError


def two_epochs(spec: Samples) -> int:
    """Samples of two epochs; streamed files do not say how many, and have fewer than this."""
    return 2 * spec.epoch_samples if isinstance(spec, CorpusSpec) else 2 * 600


SMALL = [(2, 1), (4, 0), (2, 3)]
LARGE = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 3)]


def _check_shapes(spec: Samples, shapes: list[tuple[int, int]], samples: int) -> None:
    expected = stream(spec, samples, world=1, workers=0)
    for world, workers in shapes:
        assert stream(spec, samples, world=world, workers=workers) == expected, (world, workers)
    assert stream(spec, samples, world=2, workers=0, accumulate=2) == expected


@pytest.mark.parametrize("way", WAYS)
def test_the_stream_is_the_same_for_any_ranks_and_workers(place, way):
    spec = spec_of(place, way, "masked")
    _check_shapes(spec, SMALL[:2], min(240, two_epochs(spec)))


@pytest.mark.long
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("way", WAYS)
def test_two_epochs_are_the_same_for_any_ranks_and_workers(place, way, objective):
    spec = spec_of(place, way, objective)
    _check_shapes(spec, LARGE, two_epochs(spec))


def test_every_record_comes_once_an_epoch(place):
    """And so exactly twice in two; the beginnings of records, as random crops differ from epoch to epoch."""
    spec = CorpusSpec(
        str(place / "corpus"), "train", length=64, packing="crop", crop="first", objective="causal", seed=11
    )
    n = spec.epoch_samples
    assert n == len(spec.corpus)
    with closing(steps(spec, world=2, workers=1)) as endless:
        rows = list(islice(chain.from_iterable(rows for _, rows in endless), 2 * n))
    first, second = rows[:n], rows[n:]
    assert len(set(first)) == n
    assert Counter(second) == Counter(first)
    assert second != first


# --- kills and resumes ---


def _live(place: Path, way: str, notes: Path, world: int, workers: int, last: int, most: int | None) -> None:
    """A life of a run: go on from the newest checkpoint; note each step, and write a checkpoint every third.

    After ``most`` steps it waits for its end: on a busy machine that may come late.
    """
    state = notes / "state.json"
    before = json.loads(state.read_text()) if state.exists() else {"step": 0, "samples": 0, "hash": ""}
    step, digest = before["step"], before["hash"]
    endless = steps(spec_of(place, way, "masked"), world=world, workers=workers, start=before["samples"])
    for samples, rows in endless:
        step += 1
        digest = hashlib.sha256(b"".join([digest.encode(), *rows])).hexdigest()
        if step % 3 == 0 or step == last:
            aside = state.with_suffix(".partial")
            aside.write_text(json.dumps({"step": step, "samples": samples, "hash": digest}))
            aside.replace(state)
        (notes / "pace").write_text(str(step - before["step"]))
        time.sleep(0.005)
        if step == last:
            break
        if most is not None and step - before["step"] == most:
            time.sleep(600)
    os._exit(0)


def _through_kills(place: Path, way: str, notes: Path, kills: int, last: int) -> None:
    """Live and be killed ``kills`` times, each time in another shape, then to the end; the hash is that of one life."""
    rng = random.Random(way)
    context = multiprocessing.get_context("fork")
    killed = 0
    while True:
        world, workers = rng.choice([1, 2, 4]), rng.choice([0, 0, 1])
        wanted = rng.randint(1, 7)
        most = wanted + 2 if killed < kills else None
        life = context.Process(target=_live, args=(place, way, notes, world, workers, last, most))
        pace = notes / "pace"
        pace.unlink(missing_ok=True)
        life.start()
        if killed < kills:
            while life.is_alive() and not (pace.exists() and int(pace.read_text() or 0) > wanted):
                time.sleep(0.002)
            if life.is_alive():
                os.kill(life.pid, signal.SIGKILL)
                killed += 1
        life.join(120)
        if life.exitcode == 0:
            break
    digest = ""
    with closing(steps(spec_of(place, way, "masked"), world=1, workers=0)) as endless:
        for _, rows in islice(endless, last):
            digest = hashlib.sha256(b"".join([digest.encode(), *rows])).hexdigest()
    found = json.loads((notes / "state.json").read_text())
    assert found["step"] == last
    assert found["hash"] == digest
    assert killed == kills, "the run ended before it was killed so often"


@pytest.mark.parametrize("way", ["streamed", "bucket", "reset"])
def test_killed_and_resumed_with_other_worlds_the_stream_goes_on(place, way, tmp_path):
    _through_kills(place, way, tmp_path, kills=3, last=30)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_fifty_kills_and_resumes_with_other_worlds_change_nothing(place, way, tmp_path):
    _through_kills(place, way, tmp_path, kills=50, last=400)
