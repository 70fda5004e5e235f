"""Where blocks are kept: FOLDER/blocks/NAME-FINGERPRINT/NUMBER.arrow, and what tells that they are all there.

A fingerprint is of everything that blocks depend on: the source's content, as its address, size and time of change or
the server's tag tell it, and how it is read. Seeds, splits, lengths and packing are no part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longseq_data.files import aside, sha256_of, write_text
from longseq_data.readers.formats import HUB, HubAddress, Leaf
from longseq_data.readers.reading import TOKENS, Reading
from longseq_data.readers.sources import URL
from longseq_data.readers.text import short_name

from .block import FORMAT, Block, write_block

CHANGED = "has changed while it was read: wait until it is whole, as after a download"  # how a sentence goes on
COMMIT = re.compile(r"[0-9a-f]{40}")


def default_folder() -> Path:
    """``$LONGSEQ_CACHE``, else ``longseq`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("LONGSEQ_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "longseq"
    try:
        return Path.home() / ".cache" / "longseq"
    except RuntimeError:  # a user without an entry in passwd, as in containers
        return Path("/.cache/longseq")


@dataclass(frozen=True)
class Manifest:
    """What a leaf was once it has been read to its end."""

    source: str
    records: tuple[int, ...]  # of each block
    tokens: tuple[int, ...]
    bytes_read: int  # of the source as it is stored; 0: of a table or a folder, which are not read front to back
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why a leaf could not be read to its end. ``rest``: whether there is a block of records before that."""

    sentence: str
    blocks: int  # whole ones before it
    rest: bool
    attempt: str  # no two are alike


@dataclass(frozen=True)
class Refusal:
    """Why a process could not keep blocks, in its lock."""

    sentence: str
    attempt: str  # no two are alike


@dataclass(frozen=True)
class Entry:
    """The blocks of one leaf."""

    leaf: Leaf
    folder: Path

    def block(self, number: int) -> Path:
        return self.folder / f"{number:06}.arrow"

    @property
    def rest(self) -> Path:
        return self.folder / "rest.arrow"

    @property
    def wanted(self) -> Path:
        """Something waits for the first block."""
        return self.folder / "wanted"

    def manifest(self) -> Manifest | None:
        """None where there is none that makes sense. Raises OSError."""
        values = read_json(self.folder / "manifest.json")
        with suppress(TypeError, KeyError):
            return Manifest(**{**values, "records": tuple(map(int, values["records"]))})
        return None

    def failure(self) -> Failure | None:
        """As of manifest."""
        with suppress(TypeError):
            return Failure(**read_json(self.folder / "failed.json"))
        return None

    def publish(self, number: int, block: Block) -> None:
        self._put(self.block(number), block)

    def finish(self, manifest: Manifest) -> None:
        write_text(self.folder / "manifest.json", json.dumps(asdict(manifest)))

    def fail(self, failure: Failure, rest: Block | None) -> None:
        if rest is not None:
            self._put(self.rest, rest)
        write_text(self.folder / "failed.json", json.dumps(asdict(failure)))

    def begin(self) -> None:
        """Take over what an earlier process has left. Blocks stay: they would come out alike."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / "failed.json", self.rest, self.wanted, *self.folder.glob(".*.partial")):
            path.unlink(missing_ok=True)

    def remake(self, number: int) -> None:
        """Have a block made that is missing or damaged. Others stay, and their readers. Raises OSError."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        self.block(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """Give its room back."""
        with suppress(OSError):
            (self.folder / "manifest.json").unlink(missing_ok=True)
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _put(self, path: Path, block: Block) -> None:
        with aside(path) as partial:
            write_block(block, partial)


def entry_of(folder: Path, reading: Reading, leaf: Leaf, strict: bool) -> Entry | None:
    """Where a leaf's blocks lie; None where nothing tells whether its content is still the same."""
    content = content_of(leaf.source)
    if content is None:
        return None
    how: dict[str, object] = {"format": FORMAT, "as": leaf.format, "tokens": reading.tokens, "strict": strict}
    if reading.tokens not in TOKENS:
        how["tokens"] = sha256_of(Path(reading.tokens))
    if leaf.format in ("text", "lines", "jsonl", "parquet", "hub"):
        how.update(column=reading.column, part_bytes=reading.part_bytes)
    if reading.tokens == "pixels":
        how["image_size"] = reading.image_size
    local = not leaf.source.startswith(HUB) and not URL.match(leaf.source)
    source = os.path.abspath(leaf.source) if local else leaf.source  # noqa: PTH100 - links stay
    digest = hashlib.sha256(json.dumps([source, content, how]).encode("utf-8", "surrogateescape")).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", short_name(leaf.source))[:40]
    return Entry(leaf, folder / "blocks" / f"{name}-{digest[:24]}")


def group_lock(folder: Path, entries: Sequence[Entry]) -> Path:
    """The file whose lock the process has that reads these leaves."""
    names = sorted(entry.folder.name for entry in entries)
    return folder / "locks" / hashlib.sha256("\n".join(names).encode()).hexdigest()[:24]


def content_of(source: str) -> list[object] | None:
    """What another content of the same source would not have; None where nothing tells."""
    try:
        if source.startswith(HUB):
            return _of_hub(HubAddress.parse(source))
        if URL.match(source):
            size, stamp = of_url(source)
            return None if stamp is None else [size, stamp]
        if Path(source).is_dir():
            return _of_folder(source)
        status = Path(source).stat()
        return [status.st_size, status.st_mtime_ns]
    except Exception:  # those of every filesystem plugin; reading it says what is wrong
        return None


def of_url(source: str) -> tuple[int | None, str | None]:
    """Its size, and the tag or time of change that its server tells. Raises whatever a filesystem plugin does."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(source)
    info = filesystem.info(path)
    stamps = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
    return info.get("size"), next((str(info[name]) for name in stamps if info.get(name)), None)


def _of_folder(folder: str) -> list[object]:
    digest = hashlib.sha256()
    with os.scandir(folder) as found:
        for item in sorted(found, key=lambda item: item.name):
            if item.is_file():
                status = item.stat()
                digest.update(os.fsencode(item.name) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return [digest.hexdigest()]


def _of_hub(address: HubAddress) -> list[object] | None:
    folder = Path(address.path)
    if folder.is_dir():
        return [[parent, *_of_folder(parent)] for parent, _, _ in sorted(os.walk(folder))]
    if address.revision and COMMIT.fullmatch(address.revision):
        return [address.revision]
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    return [HfApi().dataset_info(address.path, revision=address.revision, timeout=5).sha]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is none. Raises OSError."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
