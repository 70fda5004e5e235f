"""What tells whether data are still the same, without reading them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from longseq_data.corpus.corpus import is_corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.files import sha256_of
from longseq_data.ingest.cache import content_of, of_url
from longseq_data.readers.formats import HUB
from longseq_data.readers.sources import URL

EDGE = 1 << 16  # bytes at both ends of a file; the end of a gzip file holds the checksum of its content
MEASURED = 10_000  # files of a folder whose sizes are looked at, besides their names


@dataclass(frozen=True)
class Identity:
    """What tells whether a source is the same as before, without reading it. None: its server does not say."""

    name: str
    size: int | None
    stamp: str | None  # time of the last change, or the server's tag


def identify(source: str) -> Identity:
    """Never fails: reading the source says what is wrong with it."""
    try:
        if source.startswith(HUB) or (not URL.match(source) and Path(source).is_dir()):
            content = content_of(source)
            return Identity(source, None, None if content is None else json.dumps(content))
        if not URL.match(source):
            status = Path(source).stat()
            return Identity(source, status.st_size, str(status.st_mtime_ns))
        return Identity(source, *of_url(source))
    except Exception:  # those of every filesystem plugin
        return Identity(source, None, None)


def checksum(source: str) -> str:
    """SHA-256 of a file; of a folder what its files' names and sizes tell; "" of what lies elsewhere."""
    if Path(source).is_file():
        return sha256_of(Path(source))
    return identity_of(source) or "" if Path(source).is_dir() else ""


def identity_of(source: str) -> str | None:
    """A short text that another content of the same source would not have; None where that cannot be told cheaply.

    Of a prepared corpus its fingerprint; of a file its size and a hash of its ends; of a folder a hash of its files'
    names and sizes; of a URL its size; of a Hub dataset nothing: name a revision. Raises DataError for a corpus that is
    not whole.
    """
    if source.startswith(HUB):
        return None
    if URL.match(source):
        size = identify(source).size
        return None if size is None else f"size {size}"
    if is_corpus(source):
        return f"fingerprint {read_manifest(Path(source)).fingerprint[:32]}"
    path = Path(source)
    try:
        if path.is_dir():
            digest = hashlib.sha256()
            for line in _files(path):
                digest.update(os.fsencode(line) + b"\n")
            return f"files {digest.hexdigest()[:32]}"
        with path.open("rb") as handle:
            size = path.stat().st_size
            digest = hashlib.sha256(handle.read(EDGE))
            handle.seek(max(0, size - EDGE))
            digest.update(handle.read(EDGE))
        return f"size {size}, ends {digest.hexdigest()[:32]}"
    except OSError:  # reading it says what is wrong
        return None


def _files(folder: Path) -> Iterator[str]:
    paths = (
        os.path.join(parent, name)  # noqa: PTH118 - there may be a million of them
        for parent, folders, names in os.walk(folder)
        if folders.sort() is None  # the order of the walk
        for name in sorted(names)
    )
    for path in islice(paths, MEASURED):
        yield f"{os.path.relpath(path, folder)} {os.path.getsize(path)}"  # noqa: PTH202
    for path in paths:
        yield os.path.relpath(path, folder)
