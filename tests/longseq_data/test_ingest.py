"""A source is parsed once: one process turns it into blocks, and all read them as they come."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from longseq_data.errors import DataError
from longseq_data.ingest import process
from longseq_data.ingest.block import Builder, Records, open_block, write_block
from longseq_data.ingest.cache import Failure, default_folder, entry_of, group_lock
from longseq_data.ingest.follow import Road
from longseq_data.ingest.parse import parsed
from longseq_data.ingest.process import Job, ingest
from longseq_data.ingest.survey import survey
from longseq_data.os_errors import lock
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import FASTA, Reading
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.samples.sharing import Share
from longseq_data.samples.shuffling import documents_in_file_order, shuffled_documents
from longseq_data.samples.streaming import StreamSpec
from longseq_data.splits import SplitRule
from longseq_data.vocabulary import BYTES, PROTEIN
from plain_samples import training_samples


def fasta(name: str, records: int, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    return "".join(f">{name}_{i}\n{''.join(draw.choices('ACDEFGHIKL', k=300))}\n" for i in range(records)).encode()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of a small file, of those that this process makes."""
    monkeypatch.setattr("longseq_data.ingest.block.FIRST_BYTES", 1000)
    monkeypatch.setattr("longseq_data.ingest.block.MOST_BYTES", 4000)


def spec_of(*sources: str, cache: Path | None = None, **settings) -> StreamSpec:
    values = {"split": "train", "valid_fraction": 0.05, "test_fraction": 0.05, "length": 64, "packing": "concat"}
    values |= {"objective": "causal", "seed": 3, "shuffle_buffer": 50, **settings}
    return StreamSpec(sources, cache=None if cache is None else str(cache), **values)


def batches(spec: StreamSpec, count: int = 30, start: int = 0, **share: int) -> list[bytes]:
    share = {"batch_sequences": 4, "accumulate": 1, "rank": 0, "world": 1, **share}
    made = (make() for make in islice(spec.training(start, Share(**share)), count))
    return [b"".join(batch[name].astype("<i8").tobytes() for name in sorted(batch)) for batch in made]


# --- blocks


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_blocks_are_cut_at_the_same_records_however_many_come_at_once(small, at_once: int) -> None:
    draw = random.Random(1)
    tokens = [bytes(draw.choices(range(20), k=draw.choice([0, 3, 500, 9000]))) for _ in range(100)]
    names = [f"r{i}".encode() for i in range(100)]
    builder = Builder(PROTEIN)
    blocks = []
    for i in range(0, 100, at_once):
        some = slice(i, i + at_once)
        blocks += builder.add(Records(names[some], tokens[some], list(map(len, tokens[some]))))
    blocks += builder.rest()
    assert [block.ids(range(len(block))) for block in blocks] == _cut(tokens)
    assert [name for block in blocks for name in block.identifiers] == names


def _cut(tokens: list[bytes]) -> list[list[bytes]]:
    """One by one: a block ends with the record that fills it."""
    blocks: list[list[bytes]] = [[]]
    for each in tokens:
        blocks[-1].append(each)
        if sum(map(len, blocks[-1])) >= min(1000 << (len(blocks) - 1), 4000):
            blocks.append([])
    return blocks if blocks[-1] else blocks[:-1]


def test_a_block_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    builder = Builder(replace(BYTES, name="a.json", size=70_000, ordinary=69_000))
    ids = [np.array(row, np.uint32).tobytes() for row in ([1, 68_999], [], [7])]
    list(builder.add(Records([b"a", b"\xc3\xa9", b""], ids, [8, 0, 4], [b"one two", b"", b"x"])))
    builder.notes.append("a note")
    (block,) = builder.rest()
    write_block(block, tmp_path / "block")
    found = open_block(tmp_path / "block")
    assert found.tokens.dtype == np.uint32
    assert found.tokens.tolist() == [1, 68_999, 7]
    assert found.ids([0, 1, 2]) == ids
    assert list(found.identifiers) == [b"a", b"\xc3\xa9", b""]
    assert all((found.places(by) == block.places(by)).all() for by in ("id", "sequence"))
    assert found.held.tolist() == [8, 0, 4]
    assert list(found.texts or ()) == [b"one two", b"", b"x"]
    assert found.notes == ("a note",)


# --- the order


@pytest.mark.parametrize("packing", ["concat", "crop"])
def test_the_order_is_the_same_with_and_without_a_cache_and_while_blocks_come(write, cache, packing) -> None:
    sources = [write(f"{name}.fasta.gz", gzip.compress(fasta(name, 400, seed))) for seed, name in enumerate("abcde")]
    plain = spec_of(*sources, packing=packing)
    kept = replace(plain, cache=str(cache))
    for start, world, rank in ((0, 1, 0), (0, 2, 1), (333, 4, 2), (2000, 1, 0)):
        share = {"start": start, "world": world, "rank": rank}
        assert batches(kept, **share) == batches(plain, **share)
    valid, valid_kept = replace(plain, split="valid"), replace(kept, split="valid")
    assert valid_kept.target_counts().tolist() == valid.target_counts().tolist()


def test_workers_of_several_ranks_read_what_one_process_has_parsed(write, cache) -> None:
    source = write("a.fasta", fasta("a", 3000))
    for world, workers in ((1, 0), (2, 1), (2, 3)):
        found = {}
        for rank in range(world):
            settings = {"batch_sequences": 8 // world, "accumulate": 1, "rank": rank, "world": world}
            for kind in (None, cache):
                dataset = TrainingBatches(spec_of(source, cache=kind), **settings)
                rows = [batch["tokens"] for batch in islice(Loader(dataset, workers), 12)]
                found[kind] = rows
            assert all((a == b).all() for a, b in zip(found[None], found[cache], strict=True))
    (manifest,) = cache.glob("blocks/*/manifest.json")
    assert json.loads(manifest.read_text())["bytes_read"] == Path(source).stat().st_size


def test_later_epochs_come_from_the_cache_alone(write, cache) -> None:
    source = write("a.fasta", fasta("a", 100))
    spec = spec_of(source, cache=cache, packing="crop")
    expected = batches(spec_of(source, packing="crop"), 90)
    endless = spec.training(0, Share(4, 1, 0, 1))
    seen = [next(endless)() for _ in range(30)]  # more than an epoch
    status = Path(source).stat()
    Path(source).write_bytes(b"x" * status.st_size)  # the same size and time
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen += [make() for make in islice(endless, 60)]
    assert [b"".join(batch[name].astype("<i8").tobytes() for name in sorted(batch)) for batch in seen] == expected


# Of the version before blocks, whose runs go on: hashes of 40 batches from sample 0 and 12 from sample 333 on.
BEFORE = {
    ("proteins", "concat"): "a336b706d67f1545",
    ("proteins", "crop"): "70318275f053a74d",
    ("text", "concat"): "5957798355af8e34",
    ("text", "crop"): "6f2fa52c315f8b4e",
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("kind", "packing"), BEFORE)
def test_the_order_is_that_of_earlier_versions(write, cache, kind, packing, kept) -> None:
    assert order_of(write, kind, packing, str(cache) if kept else None) == BEFORE[kind, packing]


def order_of(write, kind: str, packing: str, cache: str | None) -> str:
    draw = random.Random(7)
    letters = "ACDEFGHIKLMNPQRSTVWYXJ-" if kind == "proteins" else "abc dé\u2003\n"
    sources = []
    for name in range(20):  # more than are read in turn
        texts = ["".join(draw.choices(letters, k=draw.choice([1, 9, 200]))) for _ in range(draw.randint(2, 60))]
        if kind == "proteins":
            texts = [f">{name}_{i}\nM{text}\n" for i, text in enumerate(texts)]
        sources.append(write(f"{name:02}.{kind}", "".join(texts)))
    reading = FASTA if kind == "proteins" else Reading("text", "bytes", part_bytes=300)
    more = {} if cache is None else {"cache": cache}
    digest = hashlib.sha256()
    for objective, reset, buffer in (("causal", False, 30), ("masked", packing == "concat", 10_000)):
        spec = StreamSpec(
            tuple(sources), "train", 0.1, 0.1, 32, packing, objective, 5, buffer, reading=reading, reset=reset, **more
        )
        for start, count, share in ((0, 40, Share(4, 2, 1, 2)), (333, 12, Share(4, 1, 0, 1))):
            for make in islice(spec.training(start, share), count):
                batch = make()
                for key in sorted(batch):
                    digest.update(key.encode() + np.ascontiguousarray(batch[key]).astype("<i4").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("way", [{}, {"reset": True}, {"packing": "crop", "crop": "first"}])
def test_later_epochs_are_permutations_of_all_records(write, cache, small, way) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 40, i)) for i in range(20)]
    spec = spec_of(*sources, cache=cache, later_epochs="permutation", **way)
    epochs = [[item.identifier for item in shuffled_documents(spec, epoch)] for epoch in range(3)]
    names = {document.identifier for document in documents_in_file_order(spec)}
    assert [len(epoch) for epoch in epochs] == [len(names)] * 3
    assert all(set(epoch) == names for epoch in epochs)
    assert epochs[1] != epochs[2]
    places = {name: place for place, name in enumerate(epochs[0])}
    far = np.abs(np.diff([places[name] for name in epochs[1]])).mean()
    assert abs(far / (len(names) / 3) - 1) < 0.15  # neighbours lie as far apart as two places drawn at random
    assert epochs[0] == [item.identifier for item in shuffled_documents(spec_of(*sources, **way), 0)]


@pytest.mark.parametrize("way", [{}, {"reset": True}, {"packing": "crop"}, {"objective": "masked"}])
def test_starting_late_equals_skipping_in_permuted_epochs(write, cache, way) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 20, i)) for i in range(3)]
    spec = spec_of(*sources, cache=cache, later_epochs="permutation", **way)
    epoch = 54 if "packing" in way else 255  # samples, about
    whole = batches(spec, 3 * epoch // 4 + 1)
    for start in (epoch // 4 * 4, 2 * epoch // 4 * 4, 2 * epoch // 4 * 4 + 8):
        assert batches(spec, 9, start=start) == whole[start // 4 : start // 4 + 9]
    one_by_one = islice(training_samples(spec, 2 * epoch), 12)
    made = (make() for make in spec.training(2 * epoch, Share(1, 1, 0, 1)))
    for sample, batch in zip(one_by_one, made, strict=False):
        assert (batch["tokens"][0] == sample.tokens).all()
        assert (batch["targets"][0] == sample.targets).all()


def test_permuted_epochs_without_a_cache_are_refused_in_a_sentence(write, tmp_path) -> None:
    source = write("a.fasta", fasta("a", 20))
    (tmp_path / "file").write_text("no folder")
    for folder, reason in ((None, f"{source} is not kept in data.cache"), (tmp_path / "file", "part of this path")):
        endless = spec_of(source, cache=folder, later_epochs="permutation").training(0, Share(4, 1, 0, 1))
        with pytest.raises(DataError, match=f"{reason}.*data.later_epochs=permutation.*data.cache.$"):
            for _ in endless:
                pass


# --- one parse for all


class Counting(SimpleHTTPRequestHandler):
    """Files, and how many bytes of them were asked for."""

    sent: list[int]
    pause = 0.0

    def log_message(self, *arguments: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        with suppress(ConnectionError):  # of a client that was killed
            while piece := source.read(1 << 14):
                self.sent.append(len(piece))
                outputfile.write(piece)
                time.sleep(self.pause)


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[str, list[int], type[Counting]]]:
    sent: list[int] = []
    handler = type("Handler", (Counting,), {"sent": sent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", sent, handler
    server.shutdown()
    server.server_close()


READER = """
import sys
from itertools import islice
from longseq_data.samples.sharing import Share
from longseq_data.samples.streaming import StreamSpec
url, cache, rank, world = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4])
spec = StreamSpec((url,), None, 0.0, 0.0, 64, "concat", "causal", 3, shuffle_buffer=50, cache=cache)
for make in islice(spec.training(0, Share(4, 1, rank, world)), 2000 // world):
    make()
"""


def read_together(url: str, cache: Path | str, world: int) -> None:
    """Two epochs, in processes of their own."""
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, url, str(cache), str(rank), str(world)])
        for rank in range(world)
    ]
    assert [reader.wait(120) for reader in readers] == [0] * world


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


def test_what_blocks_depend_on_has_places_of_its_own(write, cache) -> None:
    text = Leaf(write("a.txt", "one\ntwo\n"), "text")
    ways = [
        (Reading("text", "bytes"), text, False),
        (Reading("text", "bytes"), text, True),
        (Reading("text", "bytes", part_bytes=64), text, False),
        (Reading("lines", "bytes"), Leaf(text.source, "lines"), False),
        (Reading("lines", "protein"), Leaf(text.source, "lines"), False),
    ]
    entries = [entry_of(cache, *way) for way in ways]
    assert len({entry.folder for entry in entries if entry}) == len(ways)
    assert entry_of(cache, *ways[0]) == entries[0]


def test_a_relative_path_is_no_other_folders(write, cache, tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):  # alike but for their content, as what was unpacked together
        (tmp_path / name).mkdir()
        write(f"{name}/a.fasta", fasta("a", 20, seed=ord(name[0])))
        os.utime(tmp_path / name / "a.fasta", (1e9, 1e9))
        monkeypatch.chdir(tmp_path / name)
        assert batches(spec_of("a.fasta", cache=cache), 5) == batches(spec_of("a.fasta"), 5)
    assert len(list(cache.glob("blocks/*"))) == 2


def test_a_source_that_nothing_tells_apart_is_not_kept(cache) -> None:
    assert entry_of(cache, FASTA, Leaf("http://127.0.0.1:9/none.fasta", "fasta"), False) is None


# --- what goes wrong


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
    handler.pause = 0.05
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


def test_a_folder_that_cannot_be_written_is_said_and_each_reads_for_itself(write, tmp_path) -> None:
    source = write("a.fasta", fasta("a", 300))
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    said: list[str] = []
    spec = spec_of(source, cache=blocked / "cache", tell=said.append)
    assert batches(spec) == batches(spec_of(source))
    assert said
    for sentence in said:
        assert sentence.startswith(f"data.cache: {blocked}/cache")
        assert sentence.endswith(f"a part of this path is a file; correct the path. {process.ALONE}")


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["reader", *sys.argv[1:]]
"""


def test_a_full_disk_is_said_and_each_reads_for_itself(write, cache) -> None:
    source = write("a.fasta", fasta("a", 1000))
    hashed = "import hashlib; digest = hashlib.sha256()\n" + READER.replace(
        "    make()", "    digest.update(make()['tokens'].tobytes())\nprint(digest.hexdigest())"
    )
    command = [sys.executable, "-c", FULL + hashed, source, str(cache), "0", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    plain = subprocess.run([sys.executable, "-c", hashed, source, "", "0", "1"], capture_output=True, text=True)
    assert ended.stdout == plain.stdout != ""
    assert "File too large" in ended.stderr
    assert "each process reads the files for itself" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(cache.glob("blocks/*/*.arrow"))  # its room is given back


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


def test_a_block_that_was_removed_is_made_again(write, cache) -> None:
    source = write("a.fasta", fasta("a", 3000))
    spec = spec_of(source, cache=cache)
    expected = batches(spec, 230, batch_sequences=64)  # more than an epoch
    next(cache.glob("blocks/*/000001.arrow")).unlink()
    assert batches(spec, 230, batch_sequences=64) == expected


SHORT = b'{"source": "a.fasta", "records": [200]}'


DAMAGES = [
    ("000000.arrow", 0, True),
    ("000001.arrow", 700, True),
    ("000001.arrow", 700, False),
    ("000000.arrow", bytes(2000), False),
    ("000000.arrow", b"\xff" * 2000, True),
    ("manifest.json", 0, True),
    ("manifest.json", b"\xff" * 2000, True),
    ("manifest.json", b"[1]", True),
    ("manifest.json", SHORT, True),
    ("failed.json", b"{", False),
    ("failed.json", SHORT, False),
    ("lock", b"[1]", False),
    ("lock", b'{"attempt": 3}', False),
]


@pytest.mark.parametrize(("name", "content", "whole"), DAMAGES)
def test_what_is_damaged_is_made_again(write, cache, name, content, whole) -> None:
    """content: what the file is replaced by, or how many bytes are left of it."""
    source = write("a.fasta", fasta("a", 300))  # two blocks
    spec = spec_of(source, cache=cache)
    expected = batches(spec_of(source), 24, batch_sequences=64)  # more than an epoch
    assert batches(spec, 24, batch_sequences=64) == expected
    entry = next(cache.glob("blocks/*"))
    before = [open_block(path).ids(range(3)) for path in sorted(entry.glob("*.arrow"))]
    if not whole:
        (entry / "manifest.json").unlink()
    for path in cache.glob("locks/*") if name == "lock" else [entry / name]:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    assert batches(spec, 24, batch_sequences=64) == expected
    assert [open_block(path).ids(range(3)) for path in sorted(entry.glob("*.arrow"))] == before
    records = json.loads((entry / "manifest.json").read_bytes())["records"]
    assert records == [len(open_block(path)) for path in sorted(entry.glob("*.arrow"))]


@pytest.mark.parametrize("name", ["000000.arrow", "manifest.json", "failed.json"])
def test_a_cache_that_cannot_be_read_is_said_and_each_reads_for_itself(write, cache, name) -> None:
    source, said = write("a.fasta", fasta("a", 30)), []
    spec = spec_of(source, cache=cache, tell=said.append)
    spec.begin()
    assert batches(spec, 60) == batches(spec_of(source), 60)
    (entry,) = cache.glob("blocks/*")
    (entry / "manifest.json").unlink()
    (entry / name).unlink(missing_ok=True)
    (entry / name).mkdir()  # whoever is root may read and remove all files
    assert not said
    spec.begin()
    assert batches(spec, 60) == batches(spec_of(source), 60)
    assert said[0].startswith(f"data.cache: {entry / name}: Is a directory; ")
    assert said[0].endswith(f". {process.ALONE}")
    with pytest.raises(DataError, match=f"{name}: Is a directory; .*data.later_epochs=permutation.*data.cache.$"):
        batches(replace(spec, later_epochs="permutation"), 60)


def test_a_cache_is_counted_on_only_where_it_is_or_can_be_made(write, cache, tmp_path, monkeypatch) -> None:
    source = write("a.fasta", fasta("a", 30))
    twice = spec_of(source, source, cache=cache)
    assert twice.keeps_all
    assert not spec_of(source).keeps_all
    (tmp_path / "file").write_text("no folder")
    assert not spec_of(source, cache=tmp_path / "file").keeps_all
    monkeypatch.setattr("longseq_data.ingest.follow.RESERVE", 1 << 60)  # more than any disk has
    assert not twice.keeps_all
    batches(twice)
    assert twice.keeps_all  # nothing has to be written


def test_a_user_without_a_home_has_the_one_of_containers(monkeypatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "LONGSEQ_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # of no user
    assert default_folder() == Path("/.cache/longseq")


def test_parsing_may_be_left_in_the_middle(write, small) -> None:
    blocks = parsed(FASTA, Leaf(write("a.fasta", fasta("a", 100)), "fasta"), strict=False)
    assert len(next(blocks)) == 4
    blocks.close()


def test_a_survey_before_a_start_parses_nothing_that_is_kept(cache, write, monkeypatch) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 300, i) + b">odd\nMKVJB\n") for i in range(3)]
    rule = SplitRule(0.2, 0.1, "sequence")
    alone = survey(Reading(), sources, strict=False, rule=rule)
    assert (alone.records, alone.residues, alone.complete) == (903, 3 * (90_000 + 5), True)
    assert alone.unknown == {"J": 3}
    assert [note.partition(" is read as")[0] for note in alone.notes] == [
        f"{source}, line 601: 'J' in record 'odd'" for source in sources
    ]
    monkeypatch.setattr("longseq_data.ingest.follow.parsed", None)
    spec_of(*sources, cache=cache).begin()
    for _ in range(2):  # while blocks come, and from those that are there
        assert survey(Reading(), sources, strict=False, rule=rule, cache=str(cache)) == alone


def test_a_survey_of_many_files_waits_for_none_that_is_far_down_the_list(cache, write, monkeypatch) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 3, i)) for i in range(40)]
    monkeypatch.setattr("longseq_data.ingest.follow.Road._tend", lambda *nothing: None)  # nobody makes blocks
    alone = survey(Reading(), sources, strict=False)
    assert survey(Reading(), sources, strict=False, cache=str(cache)) == alone
    assert alone.records == 120
