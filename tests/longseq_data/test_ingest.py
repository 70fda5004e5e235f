"""A source is parsed once: one process turns it into blocks, and all read them as they come."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from ingesting import READER, batches, fasta, read_together, spec_of
from longseq_data.errors import DataError
from longseq_data.ingest import process
from longseq_data.ingest.cache import Failure, entry_of, group_lock
from longseq_data.ingest.follow import Road
from longseq_data.ingest.parse import parsed
from longseq_data.ingest.process import Job, ingest
from longseq_data.os_errors import lock
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import FASTA
from longseq_data.samples.rank_share import Share
from longseq_data.samples.streaming import StreamSpec


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_source_is_sent_once_whatever_the_number_of_processes(write, cache, counted, world) -> None:
    address, sent, _ = counted
    write("a.fasta.gz", content := gzip.compress(fasta("a", 1000)))
    read_together(f"{address}/a.fasta.gz", cache, world)
    assert sum(sent) == len(content)
    read_together(f"{address}/a.fasta.gz", cache, world)  # a second start
    assert sum(sent) == len(content)


def test_without_a_cache_each_process_reads_for_itself(write, counted) -> None:
    address, sent, _ = counted
    write("a.fasta.gz", content := gzip.compress(fasta("a", 1000)))
    read_together(f"{address}/a.fasta.gz", "", 2)
    assert sum(sent) >= 2 * len(content)


def test_another_content_is_read_anew(write, cache) -> None:
    source = write("a.fasta", fasta("a", 20))
    first = batches(spec_of(source, cache=cache), 5)
    write("a.fasta", fasta("a", 21, seed=9))
    assert batches(spec_of(source, cache=cache), 5) == batches(spec_of(source), 5) != first
    assert len(list(cache.glob("blocks/*"))) == 2


def test_records_before_a_bad_one_are_trained_on_and_the_sentence_is_the_readers(write, cache) -> None:
    source = write("bad.fasta", fasta("a", 500) + b">x\n>y\nAC\n")

    def told(spec: StreamSpec) -> tuple[int, str]:
        count = 0
        try:
            for _ in spec.training(0, Share(4, 1, 0, 1)):
                count += 1
        except DataError as error:
            return count, str(error)
        raise AssertionError

    spec = spec_of(source, shuffle_buffer=1)
    expected = told(spec)
    assert expected[0] > 400
    assert "record 'x' has no residues" in expected[1]
    for _ in range(2):  # what an earlier process has said is looked at again
        assert told(replace(spec, cache=str(cache))) == expected


def test_a_file_that_grows_while_it_is_read_is_no_data_to_train_on(write, cache, small, monkeypatch) -> None:
    source = write("a.fasta", fasta("a", 50))
    leaf = Leaf(source, "fasta")
    entry = entry_of(cache, FASTA, leaf, False)
    assert entry is not None
    lock_path = group_lock(cache, [entry])
    lock_path.parent.mkdir(parents=True)
    lock_path.touch()

    def growing(*args, **keys):
        for block in parsed(*args, **keys):
            with Path(source).open("ab") as file:
                file.write(b">late\nMKV\n")
            yield block

    with monkeypatch.context() as patched:
        patched.setattr(process, "parsed", growing)
        ingest(Job((entry,), FASTA, False, lock_path))
    failure = entry.failure()
    assert failure is not None
    assert failure.sentence.startswith(f"{source} has changed while it was read")
    assert (failure.blocks, entry.manifest(), list(entry.folder.glob("*.arrow"))) == (0, None, [])
    read = sum(map(len, Road(FASTA, [leaf], False, cache).blocks(leaf)))  # as it is now, in a place of its own
    assert read == Path(source).read_bytes().count(b">") > 50


def test_a_failure_goes_when_its_reason_goes(write, cache, small) -> None:
    source = write("a.fasta", fasta("a", 50))
    road = Road(FASTA, [leaf := Leaf(source, "fasta")], False, cache)
    entry = entry_of(cache, FASTA, leaf, False)
    assert entry is not None
    entry.folder.mkdir(parents=True)
    entry.fail(Failure("no connection", 0, rest=False, attempt="0"), None)
    old = Road(FASTA, [leaf], False, cache)
    assert sum(map(len, old.blocks(leaf))) == 50
    entry.clear()
    entry.folder.mkdir(parents=True)
    entry.fail(Failure("no connection", 0, rest=False, attempt="1"), None)
    with pytest.raises(DataError, match="no connection"):
        list(road.blocks(leaf))


def test_a_killed_process_is_followed_by_another_that_keeps_its_blocks(write, cache, counted) -> None:
    address, _, handler = counted
    handler.pause = 0.02
    write("a.fasta", fasta("a", 4000))  # 1.2 MB in pieces of 16 KiB
    spec = spec_of(f"{address}/a.fasta", cache=cache, shuffle_buffer=1)
    expected = batches(replace(spec, cache=None), 290, batch_sequences=64)  # more than an epoch
    endless = spec.training(0, Share(64, 1, 0, 1))
    found = [next(endless)()]
    entry = next(cache.glob("blocks/*"))
    first = (entry / "000000.arrow").stat()
    assert not (entry / "manifest.json").exists()
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "ingest.process"], capture_output=True, text=True)
    (child,) = children.stdout.split()
    os.kill(int(child), signal.SIGKILL)
    handler.pause = 0.0
    found += [make() for make in islice(endless, 289)]
    told = [b"".join(batch[name].astype("<i8").tobytes() for name in sorted(batch)) for batch in found]
    assert told == expected
    assert (entry / "manifest.json").exists()
    assert (entry / "000000.arrow").stat() == first


def test_it_ends_with_its_parent(write, cache, counted) -> None:
    address, _, handler = counted
    handler.ends = threading.Event()
    write("a.fasta", fasta("a", 10_000))
    script = READER.replace("    make()", "    make(); print('ready', flush=True); import signal; signal.pause()")
    arguments = [f"{address}/a.fasta", str(cache), "0", "1"]
    parent = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    (path,) = cache.glob("locks/" + "?" * 24)
    with path.open("ab") as file, pytest.raises(BlockingIOError):
        lock(file, path)
    parent.kill()
    parent.wait()
    with path.open("ab") as file:
        lock(file, path, wait=True)  # once it has ended
    assert not list(cache.glob("blocks/*/manifest.json"))


def test_two_jobs_share_a_source(write, cache) -> None:
    shared, own = write("a.fasta", fasta("a", 3000)), [write(f"{i}.fasta", fasta(str(i), 30, i)) for i in range(2)]
    specs = [spec_of(shared, each) for each in own]
    readers = [
        subprocess.Popen([sys.executable, "-c", READER.replace("(url,)", f"(url, {each!r})"), shared, cache, "0", "1"])
        for each in own
    ]
    assert [reader.wait(120) for reader in readers] == [0, 0]
    assert len(list(cache.glob("blocks/*/manifest.json"))) == 3
    for spec in specs:
        assert batches(replace(spec, cache=str(cache))) == batches(spec)


def test_a_leaf_that_is_waited_for_comes_before_others(write, cache, monkeypatch, small) -> None:
    monkeypatch.setattr(process, "OPEN", 1)
    monkeypatch.setattr(process, "LOOK", 0.0)
    leaves = [Leaf(write(f"{i}.fasta", fasta(str(i), 20, i)), "fasta") for i in range(4)]
    entries = [entry_of(cache, FASTA, leaf, False) for leaf in leaves]
    path = group_lock(cache, entries)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True)
    path.touch()
    entries[3].folder.mkdir(parents=True)  # type: ignore[union-attr]
    entries[3].wanted.touch()  # type: ignore[union-attr]
    ingest(Job(tuple(entries), FASTA, False, path))  # type: ignore[arg-type]
    ends = [(entry.folder / "manifest.json").stat().st_mtime_ns for entry in entries]  # type: ignore[union-attr]
    assert ends[3] < ends[1] < ends[2]
