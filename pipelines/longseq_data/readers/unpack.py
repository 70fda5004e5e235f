"""Zstandard, xz and bzip2, recognised by their first bytes; gzip has a module of its own.

Whatever is whole before a damage or a cut is given, however large the reads are; what xopen opens loses a part of it.
"""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable

READ_SIZE = 1 << 18  # compressed bytes per step


class DamagedError(Exception):
    """Compressed data that are none."""


class CutOffError(EOFError):
    """They end too early."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"the {kind} data ends too early")
        self.kind = kind


class _Members(io.RawIOBase):
    """The text of a buffered file of any number of members; errors come after everything before them."""

    def __init__(
        self, stored: io.BufferedReader, kind: str, member: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
    ) -> None:
        self._stored, self._kind, self._new = stored, kind, member
        self._member = member()
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        while True:
            if self._member.eof:
                self._input = (self._member.unused_data or self._stored.read1(READ_SIZE)).lstrip(b"\0")
                if not self._input:
                    return 0
                self._member = self._new()
            elif self._member.needs_input:
                self._input = self._stored.read1(READ_SIZE)
                if not self._input:
                    raise CutOffError(self._kind)
            try:
                given = self._member.decompress(self._input, len(view))
            except (OSError, lzma.LZMAError, EOFError) as error:
                raise DamagedError(f"{self._kind}: {error}") from error
            self._input = b""
            if given:
                view[: len(given)] = given
                return len(given)


class _Zstandard(io.RawIOBase):
    """By Arrow, which is installed anyway."""

    def __init__(self, stored: io.BufferedReader) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        try:
            given = self._stream.read(len(view))
        except OSError as error:
            if "Truncated" in str(error):
                raise CutOffError("zstd") from error
            raise DamagedError(f"zstd: {error}") from error
        view[: len(given)] = given
        return len(given)


_UNPACK: dict[bytes, Callable[[io.BufferedReader], io.RawIOBase]] = {
    b"BZh": lambda stored: _Members(stored, "bzip2", bz2.BZ2Decompressor),
    b"\xfd7zXZ\x00": lambda stored: _Members(stored, "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    b"\x28\xb5\x2f\xfd": _Zstandard,
}


def unpacker(head: bytes) -> Callable[[io.BufferedReader], io.RawIOBase] | None:
    """What unpacks a file with these first bytes; None for any other."""
    return next((unpack for magic, unpack in _UNPACK.items() if head.startswith(magic)), None)
