"""Gzip by large steps gives what gzip gives, and of damaged files everything before the damage."""

from __future__ import annotations

import gzip
import io
import random
import zlib

import pytest

from longseq_data.readers.gunzip import Gunzip
from longseq_data.readers.sources import open_binary

pytestmark = pytest.mark.interfaces

TEXT = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY\n", k=50_000)).encode() + b"A" * 70_000
SIZES = (1, 7, 300, 4096, 1 << 18)


def read(stored: bytes, size: int, fast: bool = True) -> tuple[bytes, str]:
    """The text in steps of ``size``, and the name of the error that ends it. Not ``fast``: by zlib from the start."""

    def opened() -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(stored), 512)

    handle, text = Gunzip(opened(), opened if fast else None), b""
    try:
        while piece := handle.read(size):
            text += piece
    except (EOFError, OSError, zlib.error) as error:
        return text, type(error).__name__
    return text, ""


@pytest.mark.parametrize("size", SIZES[1:])
def test_members_follow_each_other_with_zeros_between(size):
    whole = gzip.compress(TEXT[:9]) + bytes(700) + gzip.compress(b"") + gzip.compress(TEXT, 1) + bytes(3)
    assert read(whole, size) == (TEXT[:9] + TEXT, "")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda stored: stored[:-9], "EOFError"),
        (lambda stored: stored[:2000], "EOFError"),
        (lambda stored: stored[:-8] + bytes(8), "error"),
        (lambda stored: stored[:20_000] + b"\xff" * 40 + stored[20_040:], "error"),
        (lambda stored: stored + b"junk", "BadGzipFile"),
        (lambda stored: stored + b"\x1f", "BadGzipFile"),
    ],
)
def test_of_a_damaged_file_the_same_is_read_whatever_the_size_of_the_steps(damage, error):
    stored = damage(gzip.compress(TEXT, mtime=0))
    text, said = read(stored, 7)
    assert said == error
    assert TEXT.startswith(text[:9000])
    assert len(text) > 2000
    for size in SIZES[2:]:
        for fast in (True, False):
            assert read(stored, size, fast) == (text, error)


def test_wherever_a_file_is_cut_off_all_that_is_whole_is_read():
    stored = gzip.compress(TEXT[:2000], mtime=0)
    for size in range(len(stored)):
        assert read(stored[:size], 1 << 18) == read(stored[:size], 1 << 18, fast=False), size


def test_what_is_watched_is_seen_once_though_a_damaged_file_is_read_twice(tmp_path):
    stored = bytearray(gzip.compress(TEXT, mtime=0))
    stored[-6] ^= 1
    path, seen = tmp_path / "damaged.gz", []
    path.write_bytes(stored)
    with open_binary(str(path), "text", lambda piece: seen.append(bytes(piece))) as handle, pytest.raises(zlib.error):
        list(iter(lambda: handle.read1(1 << 12), b""))
    assert b"".join(seen) == stored
