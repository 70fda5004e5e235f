"""Damaged files of every format: each is read, or refused in one sentence with its file; nothing hangs or half remains.

A few hundred of each here; ``make test-long`` takes 100,000 in all.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocks import by_line, in_blocks
from longseq_data.errors import DataError
from longseq_data.ingest.parse import parsed
from longseq_data.prepare.config import PrepareConfig
from longseq_data.prepare.prepare import prepare
from longseq_data.prepare.verify import verify
from longseq_data.readers.fasta import Encoder
from longseq_data.readers.proteins import read_proteins
from longseq_data.readers.reading import Reading

SECONDS = 30.0  # one file may take; a hundred bytes that take longer hang
PROTEINS = b">a first\nACDEFGHIKL\nMNPQ\n>b TaxID=9606\nwyx*\n\n>c\nBOUXZ-J\n" * 3
ROWS = [{"text": "Es war einmal", "id": "one"}, {"text": "drei\nZeilen\n"}, {"text": "ü€😀 " * 9}, {"text": "x"}]
PLACE = re.compile(r", (?:after )?line (\d+): ")
# what the file as a whole is
FOREIGN = re.compile(
    r" is (empty|a binary file|[^,:]+, not )"
    r"|: (damaged XML|XML of another kind|the XML |the (gzip|compressed) data |nothing but)"
)
SPECIAL = [b">", b"\n", b"\r", b"\r\n", b"\n>", b"\0", b"\xff", b"\xef\xbb\xbf", b"*", b";", b" ", b"\t", b"{", b'"']


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS * 3), out, row_group_size=5)
    return out.getvalue()


JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)

# A change of the file: (what, where as a share of it, how much, bytes to put in)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "repeat", "replace"]),
        st.floats(0, 1),
        st.integers(1, 40),
        st.one_of(st.sampled_from(SPECIAL), st.binary(min_size=1, max_size=8)),
    ),
    max_size=5,
)


def changed(content: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    for what, where, much, piece in changes:
        at = int(where * len(content))
        head, middle, tail = content[:at], content[at : at + much], content[at + much :]
        content = {
            "flip": head + bytes(byte ^ piece[0] for byte in middle) + tail,
            "cut": head,
            "insert": head + piece + middle + tail,
            "remove": head + tail,
            "repeat": head + middle * 3 + tail,
            "replace": head + piece + tail,
        }[what]
    return content


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_or_refused(path: Path, content: bytes, read: Callable[[], object], placed: bool = False) -> bool:
    """Whether a file with this content is read; if not, it is refused in one sentence that names it.

    placed: and the line, unless the file as a whole is something else.
    """
    path.write_bytes(content)
    with no_hang():
        try:
            read()
        except DataError as error:
            sentence = str(error)
            assert sentence.startswith(str(path)), sentence
            assert sentence.isprintable(), ascii(sentence)
            assert len(sentence) < 500 + len(str(path)), sentence
            assert sentence.endswith((".", "?")), sentence
            if placed and not FOREIGN.match(sentence, len(str(path))):
                line = PLACE.match(sentence, len(str(path)))
                assert line, sentence
                assert int(line[1]) <= 1 + len(content.splitlines()), sentence
            return False
    return True


def read_fasta(path: Path) -> None:
    for strict in (False, True):
        encoder = Encoder(strict=strict)
        for record in read_proteins(str(path)):
            tokens = encoder.encode(record)
            assert tokens.size == record.length > 0
            assert tokens.max() < 25


def fuzz_reading(path: Path, content: bytes, placed: bool = False) -> None:
    """By lines and in blocks, which must give the same records and the same sentence.

    Where gzip data break off inside a header, blocks look at the record before it, and lines do not.
    """
    read_or_refused(path, content, lambda: read_fasta(path), placed)
    lines, blocks = by_line(str(path)), in_blocks(str(path))
    if lines and "the gzip data" in str(lines[-1]):
        assert blocks[: len(lines) - 1] == lines[:-1]
        assert len(blocks) - len(lines) in (0, 1)
        assert isinstance(blocks[-1], str)
    else:
        assert lines == blocks


def read_texts(path: Path, format: str) -> None:
    for tokens in ("bytes", "protein"):
        reading = Reading(format=format, tokens=tokens, part_bytes=64)
        for leaf in reading.leaves([str(path)]):
            for block in parsed(reading, leaf, strict=False):
                assert (block.lengths > 0).all()
                assert block.tokens.size == block.offsets[-1]


def fuzz_fasta(folder: Path, changes: list) -> None:
    path = folder / "a.fasta"
    fuzz_reading(path, changed(PROTEINS, changes), placed=True)


def fuzz_gzip(folder: Path, changes: list) -> None:
    path = folder / "a.fasta.gz"
    half = len(changes) // 2  # some of the text, the others of its compressed form
    content = changed(gzip.compress(changed(PROTEINS, changes[:half]), 1, mtime=0), changes[half:])
    fuzz_reading(path, content)


def fuzz_jsonl(folder: Path, changes: list) -> None:
    path = folder / "a.jsonl"
    read_or_refused(path, changed(JSONL, changes), lambda: read_texts(path, "jsonl"), placed=True)


def fuzz_parquet(folder: Path, changes: list) -> None:
    path = folder / "a.parquet"
    read_or_refused(path, changed(PARQUET, changes), lambda: read_texts(path, "parquet"))


def fuzz_prepare(folder: Path, changes: list) -> None:
    """No half corpus under the final name, and what is there is whole."""
    path, output = folder / "b.fasta", folder / "corpus"
    config = PrepareConfig(sources=[str(path)], output=str(output), workers=1)
    whole = read_or_refused(path, changed(PROTEINS, changes), lambda: prepare(config, overwrite=True, restart=True))
    assert output.exists() == whole
    if whole:
        verify(output, full=True)
    for rest in sorted(folder.glob("corpus*")):
        remove(rest)


def remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


PARQUET = parquet()
KINDS = {"fasta": fuzz_fasta, "gzip": fuzz_gzip, "jsonl": fuzz_jsonl, "parquet": fuzz_parquet}


def run(fuzz: Callable[[Path, list], None], folder: Path, examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(CHANGES)
    def each(changes: list) -> None:
        fuzz(folder, changes)

    each()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(kind, tmp_path):
    run(KINDS[kind], tmp_path, 150)


def test_a_damaged_file_leaves_no_half_corpus(tmp_path):
    run(fuzz_prepare, tmp_path, 25)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused_in_one_sentence(kind, tmp_path):
    run(KINDS[kind], tmp_path, int(os.environ.get("LONGSEQ_FUZZ", "100000")) // 4)


@pytest.mark.long
def test_many_damaged_files_leave_no_half_corpus(tmp_path):
    run(fuzz_prepare, tmp_path, 1000)
