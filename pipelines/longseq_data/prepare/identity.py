"""What tells whether data are still the same, without reading them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from longseq_data.corpus.corpus import is_corpus
from longseq_data.corpus.manifest import read_manifest
from longseq_data.readers.formats import HUB
from longseq_data.readers.sources import URL

EDGE = 1 << 16  # bytes at both ends of a file; the end of a gzip file holds the checksum of its content
MEASURED = 10_000  # files of a folder whose sizes are looked at, beside their names


def identity_of(source: str) -> str | None:
    """A short text that another content of the same source would not have; None where that cannot be told cheaply.

    Of a prepared corpus its fingerprint; of a file its size and a hash of its ends; of a folder a hash of its files'
    names and sizes; of a URL its size; of a Hub dataset nothing: name a revision. Raises DataError for a corpus that is
    not whole.
    """
    if source.startswith(HUB):
        return None
    if URL.match(source):
        size = _size_of_url(source)
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


def _size_of_url(source: str) -> int | None:
    from .plan import identify

    return identify(source).size


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
