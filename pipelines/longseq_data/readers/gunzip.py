"""Gzip in large steps, decompressed by ISA-L, which takes a third of the time that zlib does."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from typing import Any

isal: Any
try:
    from isal import isal_zlib as isal
except ImportError:  # there are processors without it
    isal = None

MAGIC = b"\x1f\x8b"
WRAPPED = 31  # zlib's wbits: gzip's header and checksum, and a window of 32 KiB
LEAST = 1 << 16  # compressed bytes per step
FAST_ERROR: type[Exception] = zlib.error if isal is None else isal.error
CAREFUL = 512  # a step where data are damaged, before single bytes: all that is whole shall be given


class Gunzip(io.RawIOBase):
    """The text of a buffered gzip file of any number of members, zeros after each of them skipped.

    Reading raises EOFError where it is cut off, gzip.BadGzipFile where something else follows a member, and zlib.error
    where it is damaged: in any case after everything before that, whatever the sizes of the reads.

    again: opens the file once more. With it ISA-L decompresses, which is faster but keeps to itself what it had
    decompressed of a piece before an error; then zlib reads the file from its beginning, up to what is wrong.
    """

    def __init__(self, stored: io.BufferedReader, again: Callable[[], io.BufferedReader] | None = None) -> None:
        self._stored = stored
        self._again = again if isal is not None else None
        self._member = self._next()
        self._input = b""
        self._given = 0
        self._damaged = False  # somewhere in the input

    def _next(self) -> Any:
        """What decompresses a member: alike in both libraries, but for zlib's ``copy``."""
        return (zlib if self._again is None else isal).decompressobj(WRAPPED)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        try:
            count = self._readinto(view)
        except (EOFError, gzip.BadGzipFile, FAST_ERROR):
            if self._again is None:
                raise
            self._read_again(self._again)
            count = self._readinto(view)
        self._given += count
        return count

    def _read_again(self, again: Callable[[], io.BufferedReader]) -> None:
        """Go on with zlib, from the same place."""
        self._stored.close()
        self._stored, self._again = again(), None
        self._member, self._input = self._next(), b""
        skipped = memoryview(bytearray(LEAST))
        left = self._given
        while left and (count := self._readinto(skipped[: min(left, LEAST)])):
            left -= count

    def close(self) -> None:
        self._stored.close()
        super().close()

    def _readinto(self, view: memoryview) -> int:
        while not self._member.eof or self._next_member():
            if not self._input:
                self._input = self._stored.read1(max(LEAST, len(view) // 2))
            ended = not self._input
            text = self._decompressed(len(view))
            if text:
                view[: len(text)] = text
                return len(text)
            if ended:
                raise EOFError("the compressed file ended before the end of its data")
        return 0

    def _next_member(self) -> bool:
        while not (rest := self._input.lstrip(b"\0")):
            self._input = self._stored.read1(LEAST)
            if not self._input:
                return False
        if len(rest) == 1:
            rest += self._stored.read(1)
        if not rest.startswith(MAGIC):
            raise gzip.BadGzipFile(f"Not a gzipped file ({rest[:2]!r})")
        self._input, self._member = rest, self._next()
        return True

    def _decompressed(self, most: int) -> bytes:
        """At most ``most`` bytes; empty where more input is needed."""
        if self._damaged:
            return self._until_damage(most)
        before = self._member.copy() if self._again is None else None
        try:
            text = self._member.decompress(self._input, most)
        except zlib.error:  # what it had decompressed until then is lost with it
            self._member, self._damaged = before, True
            return self._until_damage(most)
        self._input = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return text

    def _until_damage(self, most: int) -> bytes:
        size = CAREFUL
        while True:
            before = self._member.copy()
            piece, rest = self._input[:size], self._input[size:]
            try:
                text = self._member.decompress(piece, most)
            except zlib.error:
                if size == 1:
                    raise
                self._member, size = before, 1
                continue
            self._input = self._member.unconsumed_tail + rest
            if text or not self._input:
                return text
