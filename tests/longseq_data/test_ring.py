"""data.cache=none: one process parses for all of a run, and a bounded ring of its blocks is on the disk."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ingesting import READER, batches, fasta, spec_of
from longseq_data.errors import DataError
from longseq_data.ingest import ring
from longseq_data.ingest.follow import Road
from longseq_data.ingest.ring import Answers, Job, NoRingError, Reader, Ring
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import FASTA
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.rank_share import Share

KIB = 1 << 10


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rings lie."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes below a folder, looked at all the time."""
    sizes, going = [0], True

    def look() -> None:
        while going:
            total = 0
            for parent, _, names in os.walk(folder):
                for name in names:
                    with suppress(FileNotFoundError):
                        total += (Path(parent) / name).stat().st_size
            sizes.append(total)
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        going = False
        thread.join()


def test_the_disk_never_holds_more_than_the_bound(write, scratch) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 4000, i)) for i in range(3)]
    bound = 700 * KIB
    assert sum(Path(source).stat().st_size for source in sources) > 5 * bound
    spec = spec_of(*sources, ring=Ring("run", bound))
    expected = batches(replace(spec, ring=None), 700, batch_sequences=128)  # more than an epoch
    with watched(scratch) as sizes:
        assert batches(spec, 700, batch_sequences=128) == expected
    assert bound // 2 < max(sizes) <= bound + 2 * KIB  # with its notes


@pytest.mark.parametrize(("world", "workers", "packing"), [(1, 3, "concat"), (2, 1, "crop"), (2, 0, "concat")])
def test_rows_are_the_same_for_any_world_and_workers(write, world, workers, packing) -> None:
    sources = [write(f"{i}.fasta.gz", gzip.compress(fasta(str(i), 150, i))) for i in range(20)]
    plain = spec_of(*sources, packing=packing)
    shared = replace(plain, ring=Ring("run", 600 * KIB))
    settings = {"batch_sequences": 64 // world, "accumulate": 1, "world": world}
    ranks = [iter(Loader(TrainingBatches(shared, rank=rank, **settings), workers)) for rank in range(world)]
    alone = [iter(TrainingBatches(plain, rank=rank, **settings)) for rank in range(world)]
    for _ in range(90 if packing == "crop" else 240):  # more than an epoch
        for rank in range(world):
            batch, expected = next(ranks[rank]), next(alone[rank])
            assert batch.keys() == expected.keys()
            assert all((batch[name] == expected[name]).all() for name in batch)


def test_an_epoch_can_be_begun_in_its_middle(write) -> None:
    spec = spec_of(write("a.fasta", fasta("a", 3000)), ring=Ring("run", 300 * KIB))
    whole = batches(replace(spec, ring=None), 400, batch_sequences=64)
    for first in (150, 391):  # of the first epoch, and of the second
        assert batches(spec, 5, start=64 * first, batch_sequences=64) == whole[first : first + 5]


def test_many_processes_of_a_run_parse_a_source_once_an_epoch(write, counted, scratch) -> None:
    address, sent, _ = counted
    write("a.fasta.gz", content := gzip.compress(fasta("a", 1000)))
    script = READER.replace("cache=cache", "ring=Ring('run')").replace(
        "import StreamSpec", "import StreamSpec\nfrom longseq_data.ingest.ring import Ring"
    )
    script += "print(flush=True)\nsys.stdin.read()\n"  # the parser ends with the reader that has started it
    command = [sys.executable, "-c", script, f"{address}/a.fasta.gz", ""]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    readers = [subprocess.Popen([*command, str(rank), "3"], **pipes) for rank in range(3)]
    assert [reader.stdout.readline() for reader in readers] == [b"\n"] * 3
    assert len(content) < sum(sent) <= 2 * len(content)  # the second epoch has just begun
    for reader in readers:
        reader.communicate(timeout=60)
    assert [reader.returncode for reader in readers] == [0] * 3
    deadline = time.monotonic() + 60
    while any(scratch.iterdir()):  # it ends with its reader
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_parser_is_followed_by_another(write, scratch) -> None:
    spec = spec_of(write("a.fasta", fasta("a", 6000)), shuffle_buffer=1, ring=Ring("run", 600 * KIB))
    expected = batches(replace(spec, ring=None), 600, batch_sequences=64)  # more than an epoch
    endless, found = spec.training(0, Share(64, 1, 0, 1)), []
    for number in range(600):
        if number in (3, 200):
            os.kill(ring._started[-1].pid, signal.SIGKILL)
            ring._started[-1].wait()
        found.append(next(endless)())
    told = [b"".join(batch[name].astype("<i8").tobytes() for name in sorted(batch)) for batch in found]
    assert told == expected
    assert len({path.parent for path in scratch.rglob("*.arrow")}) == 1  # what the killed ones have left is gone


def test_records_before_a_bad_one_are_trained_on(write) -> None:
    content = fasta("a", 2000) + b">bad\nMK>V\n"
    spec = spec_of(write("a.fasta", content), shuffle_buffer=1, ring=Ring("run"))
    for each in (spec, replace(spec, ring=None)):
        seen, endless = [], each.training(0, Share(16, 1, 0, 1))
        with pytest.raises(DataError, match=r"a.fasta, line 4002: '>' inside a sequence"):
            seen.extend(make()["tokens"].tobytes() for make in endless)
        assert len(seen) > 400


# --- the process, without a process


@pytest.fixture
def job(write, tmp_path: Path) -> Job:
    leaf = Leaf(write("a.fasta", fasta("a", 4000)), "fasta")  # blocks of 64, 128, 256, 512 KiB, and a rest
    return Job((leaf,), FASTA, False, tmp_path / "ring", 1100 * KIB)


@pytest.fixture
def answers(job: Job) -> Answers:
    (job.folder / "x" / "asked").mkdir(parents=True)
    (job.folder / "lock").write_text("x")
    return Answers(job, job.folder / "x")


def ask(answers: Answers, job: Job, epoch: int, number: int) -> None:
    ring._ask(job.folder / "x", f"{ring._name(epoch, job.leaves[0])}-{number}")
    assert answers.look()


def on_disk(job: Job) -> list[str]:
    return sorted(path.name.partition("-")[0] + path.name[-13:-6] for path in (job.folder / "x").glob("*.arrow"))


def test_blocks_that_somebody_has_taken_make_room_first(job, answers) -> None:
    ask(answers, job, 0, 0)
    for number in (0, 1, 2, 3):  # of the next epoch: all but the last are taken, and nobody has taken that of the first
        ask(answers, job, 1, number)
    assert on_disk(job) == ["0-000000", "1-000002", "1-000003"]
    assert sum(path.stat().st_size for path in (job.folder / "x").glob("*.arrow")) <= job.bytes


def test_a_reader_that_comes_too_late_is_told(job, answers, monkeypatch) -> None:
    monkeypatch.setattr(Reader, "_tend", lambda self: None)
    for number in (0, 1, 2, 3):
        ask(answers, job, 0, number)
    assert on_disk(job) == ["0-000001", "0-000002", "0-000003"]
    ask(answers, job, 0, 0)
    with pytest.raises(NoRingError, match=r"^$"):
        Reader(job, 0).block(job.leaves[0], 0)
    assert Reader(job, 0).block(job.leaves[0], 3).lengths.sum() == 524_400  # others go on
    ask(answers, job, 0, 5)
    assert Reader(job, 0).block(job.leaves[0], 5) is None
    ask(answers, job, 0, 0)  # also when it has ended
    with pytest.raises(NoRingError, match=r"^$"):
        Reader(job, 0).block(job.leaves[0], 0)


def test_epochs_that_all_have_left_are_forgotten(job, answers) -> None:
    ask(answers, job, 0, 0)
    ask(answers, job, 1, 0)
    assert on_disk(job) == ["0-000000", "1-000000"]
    ask(answers, job, 2, 0)
    assert on_disk(job) == ["1-000000", "2-000000"]


def test_from_a_block_larger_than_the_ring_on_each_reads_for_itself(job, answers, monkeypatch) -> None:
    monkeypatch.setattr(Reader, "_tend", lambda self: answers.look())
    monkeypatch.setattr(ring, "TEND", 0.0)
    (leaf,) = job.leaves
    expected = [block.ids(range(len(block))) for block in Road(FASTA, [leaf], False).blocks(leaf)]
    answers._job = small = job._replace(bytes=300 * KIB)  # of four blocks two fit
    for _ in range(3):  # it is asked for again
        road = Road(FASTA, [leaf], False, ring=Reader(small, 0))
        assert [block.ids(range(len(block))) for block in road.blocks(leaf)] == expected


@pytest.mark.parametrize("laid", ["another user's", "a link", "open to others"])
def test_a_folder_that_others_control_is_not_used(write, scratch, tmp_path, monkeypatch, laid) -> None:
    said: list[str] = []
    spec = spec_of(write("a.fasta", fasta("a", 300)), ring=Ring("run"), tell=said.append)
    own, place = os.geteuid(), scratch / f"longseq-ring-{os.geteuid()}"
    precious = tmp_path / "home" / "thesis" / "data" / "only_copy"
    precious.parent.mkdir(parents=True)
    precious.write_text("years")
    if laid == "a link":  # what killed processes have left below it is removed
        place.symlink_to(tmp_path / "home")
    elif laid == "open to others":
        place.mkdir()
        place.chmod(0o777)
    else:
        place = scratch / f"longseq-ring-{own + 1}"
        place.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert batches(spec, 20) == batches(replace(spec, ring=None), 20)
    assert said == [
        f"{place}: it is a link, belongs to another user, or others may write into it; set TMPDIR to a folder of your "
        "own. Until then each process reads the files for itself."
    ]
    assert precious.read_text() == "years"


def test_what_others_keep_next_to_rings_is_left_alone(tmp_path) -> None:
    ring_of_another_run, kept = tmp_path / "a" / "0123", tmp_path / "cache" / "kernels"
    for folder in (ring_of_another_run, kept, tmp_path / "own"):
        folder.mkdir(parents=True)
    (ring_of_another_run.parent / "lock").touch()
    ring._sweep(tmp_path / "own")
    assert not ring_of_another_run.parent.exists()
    assert kept.is_dir()
    assert list(kept.parent.iterdir()) == [kept]
