"""Blocks: how records are cut into them, their files, and where those lie."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ingesting import batches, fasta, spec_of
from longseq_data.ingest.block import Builder, Records, open_block, write_block
from longseq_data.ingest.cache import default_folder, entry_of
from longseq_data.ingest.parse import parsed
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import FASTA, Reading
from longseq_data.vocabulary import BYTES, PROTEIN


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


def test_parsing_may_be_left_in_the_middle(write, small) -> None:
    blocks = parsed(FASTA, Leaf(write("a.fasta", fasta("a", 100)), "fasta"), strict=False)
    assert len(next(blocks)) == 4
    blocks.close()


def test_a_user_without_a_home_has_the_one_of_containers(monkeypatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "LONGSEQ_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # of no user
    assert default_folder() == Path("/.cache/longseq")
