"""FILE.part: what there is of a file that is on its way, and the lock and the checks around it.

FILE.part.json next to it says what it is a part of. FILE appears, in one step, when size and checksum agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import IO

from longseq_data.errors import DataError
from longseq_data.files import sync_folder, write_text
from longseq_data.os_errors import explained, lock

READ = 1 << 20  # bytes at a time

Progress = Callable[[int, int], None]  # bytes there, bytes in all
Notice = Callable[[str], None]  # a sentence about something that was dealt with


@dataclass(frozen=True)
class Promise:
    """What a release says of one of its files."""

    size: int  # bytes
    algorithm: str  # of hashlib: "md5", "sha256", ...
    checksum: str  # lower-case hexadecimal
    release: str  # such as "2024_01"


class Part:
    """FILE.part, open and locked: what is there of the file, and its checksum so far."""

    def __init__(self, final: Path, file: IO[bytes], promise: Promise) -> None:
        self.final = final
        self.path, self._state = _part_of(final), _state_of(final)
        self.promise = promise
        self._file = file
        self._hash = hashlib.new(promise.algorithm, usedforsecurity=False)
        self.size = os.fstat(file.fileno()).st_size
        self.conditions: dict[str, str] = {}  # what must still hold at its address for the part to fit

    def go_on(self, progress: Progress) -> bool:
        """Take up what an earlier process has left. False where it is part of another file."""
        try:
            state = json.loads(self._state.read_bytes())
            conditions = {str(key): str(value) for key, value in state.pop("conditions").items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if state != asdict(self.promise) or self.size > self.promise.size:
            return False
        self.conditions = conditions
        self._file.seek(0)
        done = 0
        while done < self.size and (chunk := self._file.read(READ)):
            self._hash.update(chunk)
            done += len(chunk)
            progress(done, self.promise.size)
        return True

    def conditions_at(self, url: str) -> dict[str, str]:
        return self.conditions if self.conditions.get("url") == url else {}

    def restart(self) -> None:
        self._file.truncate(0)
        self._file.seek(0)
        self._hash = hashlib.new(self.promise.algorithm, usedforsecurity=False)
        self.size = 0
        self.conditions = {}

    def note(self, url: str, headers: Message) -> None:
        """Write down what the bytes that follow are part of."""
        conditions = {"url": url}
        for name in ("ETag", "Last-Modified"):
            if value := headers.get(name):
                conditions[name] = value
        if conditions != self.conditions:
            self.conditions = conditions
            with _written(self):
                content = {**asdict(self.promise), "conditions": conditions}
                write_text(self._state, json.dumps(content, indent=1) + "\n")

    def append(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        with _written(self):
            while view:  # a disk that is nearly full takes a part of it
                written = self._file.write(view)
                self._hash.update(view[:written])
                self.size += written
                view = view[written:]

    def publish(self, url: str) -> None:
        """Give the file its name, if it is what was promised. Raises DataError, and removes it, if it is not."""
        found = self._hash.hexdigest()
        if found != self.promise.checksum:
            self.path.unlink()
            self._state.unlink(missing_ok=True)
            raise DataError(
                f"{url}: wrong checksum: its {self.promise.algorithm} is {found}, the release's metalink says "
                f"{self.promise.checksum}; nothing was kept. The mirror may be between two releases: run the same "
                f"command again later, or with another mirror."
            )
        with _written(self):
            os.fsync(self._file.fileno())
        self.path.replace(self.final)
        self._state.unlink(missing_ok=True)
        with suppress(OSError):  # some network filesystems cannot
            sync_folder(self.final.parent)

    def kept(self) -> str:
        return f"{self.size:,} of {self.promise.size:,} bytes are kept in {self.path}"


def check_existing(path: Path, promise: Promise, progress: Progress) -> None:
    size = path.stat().st_size
    if size == promise.size:
        digest, done = hashlib.new(promise.algorithm, usedforsecurity=False), 0
        with path.open("rb") as file:
            while chunk := file.read(READ):
                digest.update(chunk)
                done += len(chunk)
                progress(done, size)
        if digest.hexdigest() == promise.checksum:
            return
    raise DataError(
        f"{path} exists and is not the file of release {promise.release} (it has another size or checksum); move it "
        f"away, or choose another folder."
    )


def need_room(part: Part) -> None:
    missing, free = part.promise.size - part.size, shutil.disk_usage(part.path.parent).free
    if missing > free:
        raise DataError(
            f"{part.path.parent}: {missing:,} more bytes are needed and {free:,} are free; make room, or choose "
            f"another folder."
        )


@contextmanager
def _written(part: Part) -> Iterator[None]:
    """Say it in a sentence when something cannot be written: on a full disk, mostly."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{explained(error, part.path, 'cannot be written')}. {part.kept()}: run the same command again then, and "
            f"it goes on there."
        ) from error


@contextmanager
def locked(final: Path, notice: Notice) -> Iterator[IO[bytes]]:
    """FILE.part, opened and locked; removed at the end if it is empty. DataError where another process has the lock.

    The lock ends with the process, however that ends.
    """
    path = _part_of(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        while not _is_at(file := _open_locked(path, notice), path):
            file.close()  # renamed or removed by the process that had the lock until now
    except OSError as error:
        raise DataError(f"{explained(error, path, 'cannot be written')}.") from error
    with file:
        try:
            yield file
        finally:
            if os.fstat(file.fileno()).st_size == 0 and _is_at(file, path):
                path.unlink()
                _state_of(final).unlink(missing_ok=True)


def _open_locked(path: Path, notice: Notice) -> IO[bytes]:
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
    try:
        lock(file, path, notice)
    except BlockingIOError:
        file.close()
        raise DataError(
            f"{path}: another process is fetching this file; wait for it, or choose another folder."
        ) from None
    return file


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _part_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.part")


def _state_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.part.json")
