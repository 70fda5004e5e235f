"""Blocks without a cache: one process on a node parses for all of a run, and keeps a ring of the last ones on its disk.

Readers ask by the names of files, and are answered by others:

    FOLDER/lock                  held by the process that parses; it holds the name of its folder
    FOLDER/NAME/asked/E-LEAF-N   block N of a leaf in epoch E is wanted
    FOLDER/NAME/E-LEAF-N.arrow   here it is
    FOLDER/NAME/E-LEAF.json      how many blocks there are, or the first that can still come

A reader for whom this goes wrong, or that comes for a block that has made room for others, parses for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from longseq_data.children import end_with_parent, start
from longseq_data.files import own_folder
from longseq_data.os_errors import explained, lock, said
from longseq_data.readers.formats import Leaf
from longseq_data.readers.reading import Reading

from .block import BadBlockError, Block, open_block, written
from .cache import read_json
from .parse import parsed

BYTES = 1 << 29  # of blocks on the disk
AGAIN = 2  # blocks before the one that is asked for which a new process gives, for readers that are not so far
PARSERS = 64  # leaves that are open at most
FOLLOWING = 16  # leaves whose first blocks are asked for early: many files are small
NEVER = 1 << 62  # number of a block
PAUSE, TEND, LIMIT, TRIES = 0.01, 0.25, 900.0, 3  # as in follow


class NoRingError(Exception):
    """Its sentence says why there is none; empty: it has gone on without this reader."""


class Job(NamedTuple):
    leaves: tuple[Leaf, ...]
    reading: Reading
    strict: bool
    folder: Path
    bytes: int


@dataclass(frozen=True)
class Ring:
    """What the processes of a node share that read for one training. run: no two trainings have the same."""

    run: str
    bytes: int = BYTES

    def folder(self, seed: int, sources: tuple[str, ...]) -> Path:
        key = hashlib.sha256("\n".join([self.run, str(seed), *sources]).encode("utf-8", "surrogateescape"))
        return Path(tempfile.gettempdir()) / f"longseq-ring-{os.geteuid()}" / key.hexdigest()[:24]


@dataclass
class Reader:
    """A pass over the leaves of a job, in one of its processes."""

    job: Job
    epoch: int
    _tended: float = 0.0
    _tries: int = 0

    def block(self, leaf: Leaf, number: int) -> Block | None:
        """Block ``number`` of a leaf; None: there are no more. Raises NoRingError."""
        name, begun, asked = _name(self.epoch, leaf), time.monotonic(), False
        try:
            while True:
                if (place := self._place()) is not None:
                    if not number and not asked:
                        following = self.job.leaves[self.job.leaves.index(leaf) + 1 :]
                        _ask(place, *(f"{_name(self.epoch, each)}-0" for each in following[:FOLLOWING]))
                    with suppress(FileNotFoundError):
                        block = open_block(place / f"{name}-{number:06}.arrow", mapped=False)
                        _ask(place, f"{name}-{number + 1}")
                        return block
                    state = read_json(place / f"{name}.json")
                    if number < state.get("from", 0):
                        raise NoRingError("")
                    if number >= state.get("end", number + 1):
                        return None
                    if not asked:
                        asked = _ask(place, f"{name}-{number}")
                if time.monotonic() - self._tended >= TEND:
                    self._tended, asked = time.monotonic(), False
                    with suppress(FileNotFoundError):  # another one that ends removes its folders
                        self._tend()
                if time.monotonic() - begun > LIMIT:
                    raise NoRingError(f"{leaf.source}: no block of it has come for {LIMIT / 60:.0f} minutes.")
                time.sleep(PAUSE)
        except BadBlockError as error:
            raise NoRingError(f"data.cache=none: {error}.") from None
        except OSError as error:
            raise NoRingError(f"data.cache=none: {explained(error)}.") from error

    def _place(self) -> Path | None:
        with suppress(FileNotFoundError, UnicodeDecodeError):
            if name := (self.job.folder / "lock").read_text():
                return self.job.folder / name
        return None

    def _tend(self) -> None:
        """See to it that somebody answers."""
        folder = self.job.folder
        try:
            own_folder(folder.parent)
        except PermissionError as error:
            raise NoRingError(f"{folder.parent}: {said(error)}; set TMPDIR to a folder of your own.") from None
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("ab") as file:
            try:
                lock(file, folder / "lock", lambda notice: None)
            except BlockingIOError:
                return
            if self._tries >= TRIES:
                raise NoRingError(f"data.cache=none: the process that reads for all has ended {TRIES} times.")
            self._tries += 1
            file.truncate(0)
            # the process takes over the lock, which is open here
            process = start(__name__, self.job, stdout=subprocess.DEVNULL, pass_fds=[file.fileno()])
            _started.append(process)


_started: list[subprocess.Popen[bytes]] = []  # theirs end with this process


def _name(epoch: int, leaf: Leaf) -> str:
    return f"{epoch}-{hashlib.sha256('/'.join(leaf).encode('utf-8', 'surrogateescape')).hexdigest()[:24]}"


def _ask(place: Path, *names: str) -> bool:
    with suppress(FileNotFoundError):  # it has just ended
        for name in names:
            os.close(os.open(place / "asked" / name, os.O_CREAT | os.O_WRONLY, 0o600))
    return True


def _put(path: Path, data: memoryview | bytes) -> None:
    """Whole or not at all for readers. It need not survive the machine."""
    aside = path.with_suffix(".partial")
    aside.write_bytes(data)
    aside.replace(path)


def work() -> None:
    """What the process does, until its parent goes away."""
    job: Job = pickle.load(sys.stdin.buffer)
    place = job.folder / secrets.token_hex(8)
    ends = threading.Event()

    def tidy() -> None:
        ends.set()
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # another process has a folder there
            (place.parent / "lock").unlink()
            place.parent.rmdir()
            place.parents[1].rmdir()

    watcher = end_with_parent(tidy)
    try:
        _sweep(job.folder)
        (place / "asked").mkdir(parents=True)
        (job.folder / "lock").write_text(place.name)
        answers = Answers(job, place)
        while True:
            if not answers.look():
                time.sleep(PAUSE)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
    finally:  # the thread that watches the parent cannot be ended otherwise
        if ends.is_set():  # what it has removed is the reason: it is not done yet
            watcher.join(TEND)
        os._exit(0)


def _sweep(own: Path) -> None:
    """Remove what processes have left that were killed."""
    for folder in own.parent.iterdir():
        with suppress(OSError), (folder / "lock").open("r+b") as file:
            if folder != own:
                lock(file, folder / "lock", lambda notice: None)
            for rest in folder.iterdir():
                if rest.is_dir():
                    shutil.rmtree(rest, ignore_errors=True)
            if folder != own:
                (folder / "lock").unlink()
                folder.rmdir()


@dataclass
class _Leaf:
    """A leaf of an epoch on its way."""

    blocks: Generator[Block, None, None]
    next: int = 0  # number of the block that comes next


class Answers:
    """Gives the blocks that are asked for, and takes the oldest away where they would be more than ``job.bytes``."""

    def __init__(self, job: Job, place: Path) -> None:
        self._job, self._place = job, place
        self._open: OrderedDict[str, _Leaf] = OrderedDict()  # the last one that was used comes last
        self._kept: dict[tuple[str, int], int] = {}  # blocks on the disk and their sizes, the oldest first
        self._asked: dict[str, int] = {}  # the last block of each leaf that was asked for
        self._ends: dict[str, int] = {}  # how many blocks there are, of those that were read to their end
        self._epoch = 0

    def look(self) -> bool:
        """Answer; whether anything was asked for."""
        folder = self._place / "asked"
        asked = []
        for path in folder.iterdir():
            epoch, leaf, number = path.name.split("-")
            asked.append((int(epoch), int(number), f"{epoch}-{leaf}"))
        for new, block, name in sorted(asked):
            (folder / f"{name}-{block}").unlink()
            if new > self._epoch:
                self._epoch = new
                self._forget(new - 2)
            self._answer(name, block)
        return bool(asked)

    def _answer(self, name: str, number: int) -> None:
        self._asked[name] = max(number, self._asked.get(name, 0))
        if (name, number) in self._kept:
            return
        if name in self._ends:
            self._say(name, {"from": self._ends[name], "end": self._ends[name]})
            return
        if name not in self._open:
            epoch = int(name.partition("-")[0])
            source = next((each for each in self._job.leaves if _name(epoch, each) == name), None)
            if source is None:  # of another list of files
                self._say(name, {"from": NEVER})
                return
            self._open[name] = _Leaf(parsed(self._job.reading, source, strict=self._job.strict))
            if len(self._open) > PARSERS:
                self._open.popitem(last=False)[1].blocks.close()
        self._open.move_to_end(name)
        leaf = self._open[name]
        if number < leaf.next:
            self._say(name, {"from": leaf.next})
            return
        try:
            while leaf.next <= number:
                block = next(leaf.blocks, None)
                if block is None:
                    self._ends[name] = leaf.next
                    self._say(name, {"end": leaf.next})
                    del self._open[name]
                    break
                if leaf.next >= number - AGAIN:
                    self._keep(name, leaf.next, written(block))
                leaf.next += 1
        except Exception:  # each reader meets it for itself, and says it
            self._ends[name] = NEVER
            self._say(name, {"from": NEVER})
            self._open.pop(name).blocks.close()

    def _keep(self, name: str, number: int, data: memoryview) -> None:
        if len(data) > self._job.bytes:
            raise ValueError("a block larger than the ring")
        while sum(self._kept.values()) + len(data) > self._job.bytes:
            taken = (block for block in self._kept if self._asked[block[0]] > block[1])
            self._remove(next(taken, next(iter(self._kept))))
        _put(self._path(name, number), data)
        self._kept[name, number] = len(data)

    def _remove(self, block: tuple[str, int]) -> None:
        del self._kept[block]
        self._path(*block).unlink(missing_ok=True)

    def _forget(self, epoch: int) -> None:
        """All readers are past it."""
        for name in [name for name in self._asked if int(name.partition("-")[0]) <= epoch]:
            del self._asked[name]
            self._ends.pop(name, None)
            (self._place / f"{name}.json").unlink(missing_ok=True)
            for block in [block for block in self._kept if block[0] == name]:
                self._remove(block)
            if name in self._open:
                self._open.pop(name).blocks.close()

    def _path(self, name: str, number: int) -> Path:
        return self._place / f"{name}-{number:06}.arrow"

    def _say(self, name: str, state: dict[str, int]) -> None:
        _put(self._place / f"{name}.json", json.dumps(state).encode())
