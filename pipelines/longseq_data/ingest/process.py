"""The process that reads sources once for everybody: it turns leaves into blocks, and ends with its parent.

Its job is on its standard input. It holds the lock of its job from before
its start to its end, however that comes.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import secrets
import shutil
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from longseq_data.children import end_with_parent
from longseq_data.errors import DataError
from longseq_data.os_errors import explained, lock
from longseq_data.readers.reading import Reading

from .block import Block
from .cache import CHANGED, Entry, Failure, Manifest, Refusal, entry_of
from .parse import parsed

OPEN = 16  # leaves read in turn: as many as are mixed while shuffling
RESERVE = 1 << 30  # bytes of the disk that are left to others
AHEAD = 64  # blocks that training waits for; from then on it goes first
LOOK = 0.5  # seconds between looks at what is wanted
ALONE = "Until then each process reads the files for itself."


@dataclass(frozen=True)
class Job:
    """Leaves to read, those that are needed first before others."""

    entries: tuple[Entry, ...]
    reading: Reading
    strict: bool
    lock: Path


def work() -> None:
    """What the process does."""
    job: Job = pickle.load(sys.stdin.buffer)
    end_with_parent()
    job.lock.write_bytes(b"")
    try:
        ingest(job, ahead=_give_way)
    except OSError as error:
        sentence = f"data.cache: {explained(error)}."
        print(f"longseq: warning: {sentence} {ALONE}", file=sys.stderr, flush=True)
        with suppress(OSError):
            job.lock.write_text(json.dumps(asdict(Refusal(sentence, secrets.token_hex(8)))))
    except BaseException:
        traceback.print_exc()
    finally:  # the thread that watches the parent cannot be ended otherwise
        sys.stderr.flush()
        os._exit(0)


def _give_way() -> None:
    with suppress(OSError):
        os.nice(5)


def ingest(job: Job, ahead: Callable[[], object] = bool) -> None:
    """Read every leaf to its end, or to what is wrong with it. Raises OSError where blocks cannot be kept.

    ahead: called once there are AHEAD blocks.
    """
    waiting = deque(job.entries)
    turns: deque[Generator[None, None, None]] = deque()
    looked, steps = time.monotonic(), 0
    while waiting or turns:
        for _ in range(len(waiting) if len(turns) < OPEN else 0):
            _open(waiting, waiting.popleft(), turns, job)
            if len(turns) >= OPEN:
                break
        if time.monotonic() - looked > LOOK:
            for entry in [entry for entry in waiting if entry.wanted.exists()]:
                waiting.remove(entry)
                _open(waiting, entry, turns, job)
            looked = time.monotonic()
        if turns:
            steps += 1
            if steps == AHEAD:
                ahead()
            turn = turns.popleft()
            if next(turn, _END) is not _END:
                turns.append(turn)
        elif waiting:
            time.sleep(LOOK)  # others read them
        os.utime(job.lock)


_END = object()


def _open(waiting: deque[Entry], entry: Entry, turns: deque[Generator[None, None, None]], job: Job) -> None:
    """Begin with a leaf; one that another process reads waits for its end."""
    if entry.manifest() is not None:
        return
    path = job.lock.with_name(entry.folder.name)
    file = path.open("ab")
    try:
        lock(file, path, lambda notice: None)
    except BlockingIOError:
        file.close()
        waiting.append(entry)
        return
    if entry.manifest() is None:
        turns.append(_read(entry, job, file))
    else:
        file.close()


def _read(entry: Entry, job: Job, locked: IO[bytes]) -> Generator[None, None, None]:
    """Keep the blocks of a leaf, one with each step."""
    begun, count = time.monotonic(), 0

    def watch(piece: memoryview) -> None:
        nonlocal count
        count += len(piece)

    records: list[int] = []
    tokens: list[int] = []

    def keep(block: Block) -> None:
        if not entry.block(len(records)).exists():
            if shutil.disk_usage(entry.folder).free < RESERVE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(entry.folder))
            entry.publish(len(records), block)
        records.append(len(block))
        tokens.append(len(block.tokens))

    held: Block | None = None  # whether it is whole shows with the next one
    with locked, closing(parsed(job.reading, entry.leaf, strict=job.strict, watch=watch)) as blocks:
        try:
            entry.begin()
            for block in blocks:
                if held is not None:
                    keep(held)
                    yield
                held = block
        except DataError as error:
            entry.fail(Failure(str(error), len(records), held is not None, secrets.token_hex(8)), held)
            return
        except OSError:
            entry.clear()
            raise
        if held is not None:
            keep(held)
        now = entry_of(entry.folder.parents[1], job.reading, entry.leaf, job.strict)
        if now is not None and now.folder != entry.folder:  # these are blocks of some of both
            for number in range(len(records)):
                entry.block(number).unlink(missing_ok=True)
            sentence = f"{entry.leaf.source} {CHANGED}; then start again."
            entry.fail(Failure(sentence, 0, False, secrets.token_hex(8)), None)
            return
        entry.finish(Manifest(entry.leaf.source, tuple(records), tuple(tokens), count, time.monotonic() - begun))
