"""Blocks as a reader gets them: from the cache, where one process puts them once, or parsed by the reader itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from longseq_data.children import start
from longseq_data.errors import DataError
from longseq_data.os_errors import explained, lock
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading
from longseq_data.readers.sources import URL

from . import process
from .block import BadBlockError, Block, open_block
from .cache import Entry, Refusal, entry_of, group_lock, read_json
from .parse import parsed
from .process import ALONE, RESERVE, Job
from .ring import NoRingError, Reader

PAUSE = 0.02  # seconds between looks for a block
TEND = 0.25  # between looks whether somebody makes it
LIMIT = 900.0  # seconds without any block of the whole job
TRIES = 3  # processes that may end without a word

Tell = Callable[[str], object]

_started: list[subprocess.Popen[bytes]] = []  # theirs end with this process


@dataclass
class Road:
    """The blocks of some leaves.

    leaves: those needed first before others.
    folder: the cache; None: see ``ring``.
    tell: gets what is worth a warning.
    ring: gives the blocks without a cache; None: every reader parses for itself.
    """

    reading: Reading
    leaves: list[Leaf]
    strict: bool
    folder: Path | None = None
    tell: Tell | None = None
    ring: Reader | None = None
    _entries: dict[Leaf, Entry] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)  # failures of earlier jobs: read again before they are believed
    _process: subprocess.Popen[bytes] | None = None
    _tries: int = 0
    _tended: float = 0.0

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        for leaf in self.leaves:
            entry = entry_of(self.folder, self.reading, leaf, self.strict)
            if entry is not None:
                self._entries[leaf] = entry
                with suppress(OSError):  # said when a block is wanted
                    if failure := entry.failure():
                        self._known.add(failure.attempt)
        if refusal := self._refusal():
            self._known.add(refusal.attempt)

    def begin(self) -> None:
        """Have the leaves read, unless that is done or under way."""
        with suppress(_NoCacheError, OSError):  # said when a block is wanted
            if any(entry.manifest() is None for entry in self._entries.values()):
                self._tend(None)

    def begun(self, leaf: Leaf) -> bool:
        """Whether there are, or may soon be, blocks of a leaf in the cache."""
        entry = self._entries.get(leaf)
        return entry is not None and entry.folder.is_dir()

    def blocks(self, leaf: Leaf) -> Generator[Block, None, None]:
        """All blocks of a leaf in their order, waiting for those that are still to come. Raises DataError."""
        entry, number = self._entries.get(leaf), 0
        if entry is not None:
            try:
                while (block := self._await(entry, number)) is not None:
                    yield self._told(block)
                    number += 1
                return
            except _NoCacheError as error:
                if self.tell is not None:
                    self.tell(f"{error} {ALONE}")
        elif self.folder is not None and (URL.match(leaf.source) or leaf.format == "hub") and self.tell is not None:
            self.tell(
                f"{leaf.source}: neither a tag nor a time of change tells its content from another, so it is not kept "
                "in data.cache, and each process reads it for itself."
            )
        if entry is None and self.ring is not None:
            try:
                while (block := self.ring.block(leaf, number)) is not None:
                    yield self._told(block)
                    number += 1
                return
            except NoRingError as error:
                if str(error) and self.tell is not None:
                    self.tell(f"{error} {ALONE}")
        with closing(parsed(self.reading, leaf, strict=self.strict)) as blocks:
            for block in islice(blocks, number, None):
                yield self._told(block.spilled() if self.reading.tokens == "pixels" else block)

    def kept(self, leaf: Leaf) -> list[Block]:
        """All blocks of a leaf, once they are all in the cache. Raises DataError, also where they cannot be kept."""
        entry = self._entries.get(leaf)
        blocks: list[Block] = []
        try:
            if entry is None:
                raise _NoCacheError(f"{leaf.source} is not kept in data.cache.")
            while (block := self._await(entry, len(blocks))) is not None:
                blocks.append(block)
        except _NoCacheError as error:
            raise DataError(
                f"{error} Epochs after the first are permutations of all records (data.later_epochs=permutation), "
                "which need the blocks: make room, or name another folder in data.cache."
            ) from None
        return blocks

    @property
    def is_whole(self) -> bool:
        """Whether every leaf lies in the cache. Raises OSError."""
        there = self.folder is not None and len(self._entries) == len(set(self.leaves))
        return there and all(entry.manifest() is not None for entry in self._entries.values())

    @property
    def keeps_all(self) -> bool:
        """Whether every leaf lies in the cache, or has a place there that can be written."""
        if self.folder is None or len(self._entries) < len(set(self.leaves)):
            return False
        try:
            if self.is_whole:
                return True
            for path in (self.folder / "blocks", self._lock.parent):
                path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path).close()
            return shutil.disk_usage(self.folder).free >= RESERVE
        except OSError:
            return False

    def _told(self, block: Block) -> Block:
        if self.tell is not None:
            for note in block.notes:
                self.tell(note)
        return block

    def _await(self, entry: Entry, number: int) -> Block | None:
        """Block ``number``; None: there are no more."""
        try:
            begun, beat = time.monotonic(), 0.0
            while True:
                if (block := _opened(entry, number)) is not None:
                    return block
                manifest = entry.manifest()
                if manifest is not None:
                    if number >= len(manifest.records):
                        return None
                    if (block := _opened(entry, number)) is not None:
                        return block
                    entry.remake(number)  # somebody has removed it
                failed = entry.failure()
                if failed is not None and failed.attempt not in self._known:
                    if failed.rest and number == failed.blocks:
                        with suppress(FileNotFoundError):
                            return open_block(entry.rest)
                    if number >= failed.blocks:
                        raise DataError(failed.sentence)
                self._tend(entry)
                with suppress(OSError):
                    os.close(os.open(entry.folder, os.O_RDONLY))  # NFS looks for new names when a folder is opened
                    now = self._lock.stat().st_mtime
                    begun, beat = (time.monotonic(), now) if now != beat else (begun, beat)
                if time.monotonic() - begun > LIMIT:
                    raise DataError(
                        f"{entry.leaf.source}: no block of it has come into {entry.folder} for {LIMIT / 60:.0f} "
                        f"minutes, though a process has {self._lock}; see what it waits for, end it, or set "
                        "data.cache=none."
                    )
                time.sleep(PAUSE)
        except OSError as error:
            raise _NoCacheError(f"data.cache: {explained(error)}.") from error

    @property
    def _lock(self) -> Path:
        assert self.folder is not None
        return group_lock(self.folder, list(self._entries.values()))

    def _refusal(self) -> Refusal | None:
        """Why the last process could not keep blocks."""
        with suppress(OSError, TypeError):
            return Refusal(**read_json(self._lock))
        return None

    def _tend(self, entry: Entry | None) -> None:
        """See to it that a process reads the leaves. Raises _NoCacheError where none can."""
        if time.monotonic() - self._tended < TEND:
            return
        self._tended = time.monotonic()
        path = self._lock
        try:
            if entry is not None and not entry.folder.is_dir():
                entry.folder.mkdir(parents=True, exist_ok=True)
                entry.wanted.touch()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                try:
                    lock(file, path, lambda notice: None)
                except BlockingIOError:
                    return  # it is at work
                if self._process is not None and self._process.poll() is None:
                    return  # of a file system without locks
                if all(each.manifest() is not None for each in self._entries.values()):
                    return
                refusal = self._refusal()
                if refusal and refusal.attempt not in self._known:
                    raise _NoCacheError(refusal.sentence)
                if self._tries >= TRIES:
                    raise _NoCacheError(f"data.cache: the process that fills {self.folder} has ended {TRIES} times.")
                self._tries += 1
                job = Job(tuple(self._entries.values()), self.reading, self.strict, path)
                # the process takes over the lock, which is open here
                self._process = start(process.__name__, job, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()])
                _started.append(self._process)
        except OSError as error:
            raise _NoCacheError(f"data.cache: {explained(error)}.") from error


class _NoCacheError(Exception):
    """The cache cannot be used."""


def _opened(entry: Entry, number: int) -> Block | None:
    """None: it is not there, or was none. Raises OSError."""
    path = entry.block(number)
    try:
        return open_block(path)
    except FileNotFoundError:
        return None
    except BadBlockError:
        entry.remake(number)
        return None
