"""Gzip by large steps gives what gzip gives, and of damaged files everything before the damage."""

from __future__ import annotations

import gzip
import io
import random
import zlib

import pytest

from longseq_data.gunzip import Gunzip, ahead

TEXT = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY\n", k=50_000)).encode() + b"A" * 70_000
SIZES = (1, 7, 300, 4096, 1 << 18)


def read(stored: bytes, size: int) -> tuple[bytes, str]:
    """The text in steps of ``size``, and the name of the error that ends it."""
    handle, text = Gunzip(io.BufferedReader(io.BytesIO(stored), 512)), b""
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
        assert read(stored, size) == (text, error)


def test_what_is_read_ahead_comes_in_order_and_its_error_after_it():
    def numbers():
        yield from range(5)
        raise EOFError

    coming = ahead(numbers())
    assert [next(coming) for _ in range(5)] == list(range(5))
    with pytest.raises(EOFError):
        next(coming)
