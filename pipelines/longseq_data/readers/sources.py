"""Where data comes from: paths, globs and URLs become a list of sources, and a source becomes lines of text."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TextIO, cast

from longseq_data.errors import DataError, one_line
from longseq_data.os_errors import explained

from .formats import HUB, HubAddress, folder_format
from .gunzip import MAGIC, Gunzip
from .unpack import CutOffError, DamagedError, unpacker

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
HTTP = re.compile(r"https?://", re.IGNORECASE)
LOCAL_URL = re.compile(r"(file|local)://", re.IGNORECASE)

READ_SIZE = 1 << 18  # bytes a read

Watch = Callable[[memoryview], object]

# First bytes of what users hand over by mistake -> its name.
FOREIGN = {
    b"BZh": "bzip2-compressed twice",
    b"\xfd7zXZ\x00": "xz-compressed twice",
    b"\x28\xb5\x2f\xfd": "Zstandard-compressed twice",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x04\x22\x4d\x18": "LZ4-compressed",
    b"\x1f\x9d": "compress-compressed (.Z)",
    MAGIC: "gzip-compressed three times",
    b"PAR1": "a Parquet file",
    b"%PDF-": "a PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def expand_sources(patterns: Sequence[str], format: str = "fasta") -> list[str]:
    """Sources named by ``patterns``: each a path, a glob (``**`` too), a URL of any fsspec filesystem, or on the Hub.

    Local sources come back as absolute paths. The order is that of the patterns, sorted within a glob. A file with
    several names (a link, "..", file://) comes once, by the first of them. A URL without a glob is not opened here, nor
    is a Hub address (see formats.HubAddress). A directory is a source where it holds files of ``format``, one of
    formats.FORMATS or "auto"; but never for FASTA.

    Raises DataError for a missing file, another directory, a glob that matches nothing, and a name that is no text or
    that a configuration file could not hold.
    """
    sources: dict[object, str] = {}
    for pattern in patterns:
        for source in _expand(pattern, format):
            _refuse_unstorable(source)
            sources.setdefault(_identity(source), source)
    return list(sources.values())


def _expand(pattern: object, format: str) -> list[str]:
    if not isinstance(pattern, str):
        raise DataError(f"{pattern!r} is no file name; several names go in one pair of brackets: '[a.fasta,b.fasta]'.")
    if not pattern.strip():
        raise DataError(f"A file name is empty ({pattern!r}); remove it from the list, or name a file.")
    _refuse_unstorable(pattern)  # an error message could not hold it either
    if pattern.startswith(HUB):
        return [str(HubAddress.parse(pattern).absolute())]
    if format == "hub":
        raise DataError(
            f"{pattern}: an address on the Hub is {HUB}OWNER/NAME, with data.format=hub; correct one of them."
        )
    try:
        return _expand_url(pattern) if URL.match(pattern) else _expand_path(pattern, format)
    except DataError:
        raise
    except Exception as error:  # every filesystem plugin has exceptions of its own
        raise reading_error(pattern, None, error) from error


def _refuse_unstorable(source: str) -> None:
    """Raise DataError for a name that does not survive being written to the YAML of a run and read back."""
    try:
        source.encode()
    except UnicodeEncodeError:
        # ascii(): its bytes could not be printed
        raise DataError(f"{source!a}: this name is not UTF-8, so no configuration can hold it; rename it.") from None
    if "${" in source:
        raise DataError(f"{source}: a configuration reads '${{' in a name as a reference to a key; rename it.")


def _identity(source: str) -> object:
    """Equal for two names of one local file; other sources have nothing but their address."""
    path = source
    if source.startswith(HUB):
        return source
    if URL.match(source):
        if not LOCAL_URL.match(source):
            return source
        import fsspec

        path = fsspec.core.strip_protocol(source)
    try:
        status = Path(path).stat()
    except OSError:  # reading it says what is wrong
        return source
    return status.st_dev, status.st_ino


def _expand_path(pattern: str, format: str) -> list[str]:
    expanded = os.path.expanduser(pattern)  # noqa: PTH111 - Path's own raises for an unknown ~user
    path = Path(expanded).absolute()
    if path.is_dir():
        if folder_format(str(path), format) != "fasta":
            return [str(path)]
        raise DataError(f"{pattern} is a directory; name its files, for example '{pattern.rstrip('/')}/*.fasta.gz'.")
    if path.is_file():
        return [str(path)]
    if path.exists():
        raise DataError(f"{pattern} is no regular file; training reads its data more than once, so save it to a file.")
    if not glob.has_magic(pattern):
        hint = "several files go in brackets: '[a.fasta,b.fasta]'" if "," in pattern else "correct the path"
        raise DataError(f"{pattern} does not exist (looked in {Path.cwd()}); {hint}.")
    # glob.glob and not Path.glob: the pattern may be absolute. Relative ones stay so, as the name of the working
    # directory is no pattern.
    found = [Path(match).absolute() for match in glob.glob(expanded, recursive=True)]  # noqa: PTH207
    matches = sorted(str(match) for match in found if match.is_file())
    if not matches:
        raise DataError(f"No file matches {pattern} (looked in {Path.cwd()}); correct the pattern.")
    return matches


def _expand_url(pattern: str) -> list[str]:
    # '?' starts the query of an HTTP URL, and brackets an IPv6 host. A chain (zip://*::file) loses its tail in a glob.
    magic = "*" in pattern if HTTP.match(pattern) else glob.has_magic(pattern)
    if not magic or "::" in pattern:
        return [pattern]
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(pattern)
    matches = sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))
    if not matches:
        raise DataError(f"No file matches {pattern}; correct the pattern, or name the files one by one.")
    return matches


@contextmanager
def open_text(source: str, watch: Watch | None = None) -> Iterator[TextIO]:
    """Open a FASTA file by path or URL for reading lines: see open_binary.

    Lines may end in LF, CRLF or CR. Bytes that are not UTF-8 read as U+FFFD: a header from another century is no reason
    to stop.
    """
    with open_binary(source, "FASTA", watch) as handle:
        yield as_text(handle)


def as_text(handle: io.BufferedReader) -> TextIO:
    """The lines of open_text."""
    return io.TextIOWrapper(handle, encoding="utf-8-sig", errors="replace")


@contextmanager
def open_binary(source: str, kind: str, watch: Watch | None = None) -> Iterator[io.BufferedReader]:
    """Open a path or URL; gzip, zstd, xz and bzip2 are recognised by their first bytes, whatever the name says.

    kind: what it should be, "FASTA", "text" or "JSON Lines".
    watch: called with each piece of the source as it is stored, still compressed, in order.

    Raises DataError where the source cannot be opened, is empty, or is clearly not text.
    """
    with ExitStack() as stack:
        watched: _Watched | None = None

        def opened() -> io.BufferedReader:
            nonlocal watched
            raw = cast(io.RawIOBase, stack.enter_context(open_raw(source)))
            if URL.match(source):
                raw = _Filled(raw)
            if watch is not None:
                raw = watched = _Watched(raw, watch, watched.seen if watched else 0)
            return io.BufferedReader(raw, READ_SIZE)

        try:
            buffered = opened()
            if unpack := unpacker(buffered.peek(6)):
                buffered = io.BufferedReader(unpack(buffered), READ_SIZE)
            elif buffered.peek(2)[:2] == MAGIC:
                buffered = io.BufferedReader(Gunzip(buffered, again=opened), READ_SIZE)
            if buffered.peek(2)[:2] == MAGIC:  # compressed twice, as by a server and by hand
                buffered = io.BufferedReader(Gunzip(buffered), READ_SIZE)
            head = buffered.peek(1024)[:1024]
        except Exception as error:  # every filesystem plugin has exceptions of its own
            raise reading_error(source, None, error) from error
        _refuse_foreign(source, head, kind)
        yield buffered


class _Filled(io.RawIOBase):
    """A raw file of which every read but the last fills its buffer: a server may begin with a single byte."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._problem: Exception | None = None  # for the next read: this one has something to give

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._problem is not None:
            raise self._problem
        view, count = memoryview(buffer), 0
        try:
            while count < len(view) and (more := self._raw.readinto(view[count:])):
                count += more
        except Exception as error:  # every filesystem plugin has exceptions of its own
            if not count:
                raise
            self._problem = error
        return count


class _Watched(io.RawIOBase):
    """A raw file that shows everything read from it to a function, after the first ``seen`` bytes."""

    def __init__(self, raw: io.RawIOBase, watch: Watch, seen: int) -> None:
        self._raw = raw
        self._watch = watch
        self._place = 0
        self.seen = seen  # by the function

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int | None:  # type: ignore[override]
        count = self._raw.readinto(buffer)
        if count:
            self._place += count
            if self._place > self.seen:
                self._watch(memoryview(buffer)[max(0, count - (self._place - self.seen)) : count])
                self.seen = self._place
        return count


def open_raw(source: str, seekable: bool = False) -> IO[bytes]:
    """The bytes of a path or URL as they are. Raises whatever the filesystem does: see reading_error.

    seekable: a server must then answer range requests.
    """
    if not URL.match(source):
        return Path(source).open("rb", buffering=0)
    import fsspec

    if not HTTP.match(source):
        return cast("IO[bytes]", fsspec.open(source, "rb").open())
    import aiohttp

    # aiohttp's default limit of five minutes is for the whole download; the limits here are for silence
    client = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)}
    if seekable:
        return cast("IO[bytes]", fsspec.open(source, "rb", client_kwargs=client).open())
    # block_size=0: one connection read front to back, which needs no range requests of the server
    return cast("IO[bytes]", fsspec.open(source, "rb", block_size=0, client_kwargs=client).open())


def _refuse_foreign(source: str, head: bytes, kind: str) -> None:
    content = "FASTA records" if kind == "FASTA" else kind
    if not head:
        raise DataError(f"{source} is empty; give a file with {content}, or remove it from the list.")
    for magic, name in FOREIGN.items():
        if head.startswith(magic):
            plain = "plain (ASCII)" if kind == "FASTA" else "plain (UTF-8)"
            wanted = "plain text" if kind == "text" else kind
            raise DataError(f"{source} is {name}, not {wanted}; convert it to {plain} or gzipped {kind}.")
    if head[257:262] == b"ustar":
        raise DataError(f"{source} is a tar archive, not {kind}; unpack it, and name the files in it.")
    if b"\0" in head:
        raise DataError(f"{source} is a binary file, not {kind}; give plain or gzipped {kind}.")


def reading_error(source: str, line: int | None, error: BaseException) -> DataError:
    """The sentence for an exception met while opening ``source``, or reading on after its line ``line``."""
    where = source if line is None else f"{source}, after line {line}"
    if isinstance(error, EOFError):
        kind = error.kind if isinstance(error, CutOffError) else "gzip"
        return DataError(
            f"{where}: the {kind} data ends too early, so the file is truncated; download or copy it again."
        )
    if isinstance(error, DamagedError):
        return DataError(f"{where}: the compressed data is damaged ({one_line(error)}); download or copy it again.")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return DataError(f"{where}: the gzip data is damaged ({one_line(error)}); download or copy it again.")
    if isinstance(error, FileNotFoundError):
        # fsspec says "not found" of a server that does not answer, or refuses, too; only the cause tells
        cause = error.__cause__
        if cause and (_denied(cause) or (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError))):
            return reading_error(source, line, cause)
        return DataError(f"{where}: not found; correct the address.")
    if isinstance(error, OSError) and error.errno and (LOCAL_URL.match(source) or not URL.match(source)):
        return DataError(f"{explained(error, where, 'cannot be read')}.")
    if isinstance(error, ImportError):
        package = getattr(error.__cause__ or error, "name", None)
        if package:
            return DataError(f"{where}: this kind of URL needs a package that is missing: pip install {package}")
        return DataError(f"{where}: this kind of URL needs a package that is missing ({one_line(error)}).")
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return DataError(
            f"{where}: unknown kind of URL ({one_line(error)}); use a path, https:// or another of fsspec's."
        )
    what = "your credentials for it" if _denied(error) else "the address and the connection"
    return DataError(f"{where}: cannot be read ({one_line(error)}); check {what}.")


def _denied(error: BaseException) -> bool:
    """Whether a server wants to know who asks, or knows and refuses; plugins have classes of their own for it."""
    status = getattr(error, "status", getattr(error, "code", None))
    return isinstance(error, PermissionError) or "credential" in str(error).lower() or status in (401, 403)
