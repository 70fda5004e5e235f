"""A cache that is damaged, full or not to be written: made again, or done without, and the rows are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ingesting import READER, batches, fasta, spec_of
from longseq_data.errors import DataError
from longseq_data.ingest import process
from longseq_data.ingest.block import open_block


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
