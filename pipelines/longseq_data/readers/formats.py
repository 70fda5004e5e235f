"""Kinds of files, told by their names: which format a source has, and which files a folder of them holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from longseq_data.errors import DataError
from longseq_data.files import user_path

# format: how a name of it ends, for a folder of such files and for format "auto"
SUFFIXES: dict[str, tuple[str, ...]] = {
    "fasta": (".fasta", ".fa", ".faa", ".fas"),
    "text": (".txt", ".text", ".md"),
    "lines": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "images": (".png", ".jpg", ".jpeg"),
    "hub": (),
}
FORMATS = tuple(SUFFIXES)

HUB = "hub:"
LOOK = 10_000  # files of a folder, to tell its format

_COMPRESSED = re.compile(r"\.(gz|bgz|zst|zstd|xz|bz2)$")
_HUB = re.compile(r"hub:(?P<path>[^:@#]+)(?::(?P<config>[^@#]+))?(?:@(?P<revision>[^#]+))?(?:#(?P<split>[\w.+-]+))?")


@dataclass(frozen=True)
class HubAddress:
    """A dataset on the Hugging Face Hub, or a local folder that ``datasets.load_dataset`` reads in the same way."""

    path: str  # OWNER/NAME, or a folder
    config: str | None
    revision: str | None
    split: str

    @classmethod
    def parse(cls, source: str) -> HubAddress:
        """Read ``hub:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]``; the split is "train" where none is named.

        Raises DataError for anything else.
        """
        match = _HUB.fullmatch(source)
        if not match:
            raise DataError(
                f"{source}: an address on the Hub is hub:OWNER/NAME[:CONFIG][@REVISION][#SPLIT], the split a plain "
                "name; correct it."
            )
        found = match.groupdict()
        return cls(found["path"], found["config"], found["revision"], found["split"] or "train")

    def absolute(self) -> HubAddress:
        """The same with the full path of a local folder."""
        folder = user_path(self.path)
        return replace(self, path=str(folder.absolute())) if folder.is_dir() else self

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.path}{config}{revision}#{self.split}"


def format_of(source: str, format: str) -> str:
    """The format of a file, URL, folder or Hub address: ``format`` itself, or for "auto" by its name, else FASTA.

    Raises DataError for a folder of several formats.
    """
    if source.startswith(HUB):
        return "hub"
    if format != "auto":
        return format
    return _by_name(source) or (folder_format(source, format) if Path(source).is_dir() else "fasta")


def folder_format(folder: str, format: str) -> str:
    """The format of the files in a folder; "fasta" where it has FASTA files or none that are known.

    Raises DataError if it holds none of ``format``, or for "auto" several formats.
    """
    if format == "fasta":
        return format
    if format != "auto":
        if next(_files(folder, SUFFIXES[format]), None) is None:
            endings = ", ".join(SUFFIXES[format]) or "any"
            raise DataError(
                f"{folder} has no files of data.format={format} ({endings}); name another folder or format."
            )
        return format
    found: dict[str, str] = {}
    for file in islice(_files(folder, _KNOWN), LOOK):
        kind = _by_name(file)
        if kind is None:
            return "fasta"
        found.setdefault(kind, file)
    if not found:
        return "fasta"
    if len(found) > 1:
        examples = ", ".join(f"{Path(file).name} ({name})" for name, file in found.items())
        raise DataError(f"{folder} holds files of several formats, {examples}; say which in data.format.")
    return next(iter(found))


class Leaf(NamedTuple):
    """What is read in one go: a file, a URL, a Hub dataset, or a folder's images, and its format."""

    source: str
    format: str


def leaves(source: str, format: str) -> list[Leaf]:
    """The files of a folder that have its format, sorted, hidden ones left out; else the source itself.

    Of images, the folders that hold them: they are far too many to be named one by one.
    """
    kind = format_of(source, format)
    if kind == "hub" or not Path(source).is_dir():
        return [Leaf(source, kind)]
    files = _files(source, SUFFIXES[kind])
    names = dict.fromkeys(str(Path(file).parent) for file in files) if kind == "images" else files
    return [Leaf(name, kind) for name in names]


_GUESSED = ("text", "jsonl", "parquet", "images")
_KNOWN = tuple(suffix for kind in ("fasta", *_GUESSED) for suffix in SUFFIXES[kind])


def _by_name(source: str) -> str | None:
    path = urlsplit(source).path if "://" in source else source
    name = _unpacked(path)
    return next((kind for kind in _GUESSED if name.endswith(SUFFIXES[kind])), None)


def _unpacked(name: str) -> str:
    """A name as it was before the file was compressed."""
    return _COMPRESSED.sub("", name.lower())


def _files(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and _unpacked(name).endswith(suffixes):
                yield str(Path(parent) / name)
