"""Processes that prepare batches next to their parent. No torch here: they start in a moment.

To a worker, on its standard input: pickled, its part of the plan; then a byte for each pass. From
it, on its standard output, pickled and each behind its length: its parcels and log records; after the last of a pass
None, or the exception that ended it.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from logging.handlers import QueueHandler
from typing import IO, Any

from longseq_data.children import send, start

from .rank_share import Evaluation, Training
from .transport import Parcel, pack

_LENGTH = struct.Struct("<Q")
_GONE = object()


class Background:
    """``count`` processes that prepare the batches of ``plan``, each ``prefetch`` of them ahead.

    They end with this process, however it ends, and once this object is gone.
    """

    def __init__(self, plan: Training | Evaluation, count: int, prefetch: int) -> None:
        self._workers = [
            start(__name__, (plan, number, count, prefetch), stdout=subprocess.PIPE) for number in range(count)
        ]
        self.close = weakref.finalize(self, _end, self._workers)

    def one_pass(self) -> Iterator[Parcel]:
        """All batches, in their order.

        Raises:
            Exception: what ended a worker's pass, a DataError first of all.
            RuntimeError: if a worker is gone.
        """
        for worker in self._workers:
            send(worker, b"\n")
        going = list(self._workers)
        while going:
            for worker in tuple(going):
                parcel = _next(worker)
                if parcel is None:
                    going.remove(worker)
                else:
                    yield parcel


def _next(worker: subprocess.Popen[bytes]) -> Parcel | None:
    while True:
        item = _read(worker.stdout)  # type: ignore[arg-type]
        if item is _GONE:
            code = worker.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise RuntimeError(f"A process that prepares batches {how}; if memory ended, lower data.workers.")
        if isinstance(item, logging.LogRecord):
            logger = logging.getLogger(item.name)
            if logger.isEnabledFor(item.levelno):
                logger.handle(item)
        elif isinstance(item, BaseException):
            raise item
        else:
            return item


def _read(pipe: IO[bytes]) -> Any:
    length = pipe.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return _GONE
    data = bytearray(_LENGTH.unpack(length)[0])
    return pickle.loads(data) if pipe.readinto(data) == len(data) else _GONE  # type: ignore[attr-defined]


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.kill()  # there is nothing that it would leave half done
    for worker in workers:
        for pipe in (worker.stdin, worker.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        worker.wait()


def work() -> None:
    """What a worker does, until its parent goes away."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no parcel
    ready: queue.Queue[bytes] = queue.Queue()
    passes: queue.Queue[bytes] = queue.Queue()
    logging.getLogger().addHandler(_ToParent(ready))
    threading.Thread(target=_write, args=(ready, out), daemon=True).start()
    try:
        plan, number, count, prefetch = pickle.load(sys.stdin.buffer)
    except Exception as error:
        ready.put(_pickled(_portable(error)))
        plan = None
    threading.Thread(target=_listen, args=(passes,), daemon=True).start()
    if plan is not None:
        ready.maxsize = max(1, prefetch - 2)  # one more is being written, and one made
    while passes.get() and plan is not None:
        ready.put(_pickled(_prepare(plan, number, count, ready)))


def _prepare(plan: Training | Evaluation, number: int, count: int, ready: queue.Queue[bytes]) -> Exception | None:
    """One pass: how it ended."""
    try:
        for arrays in plan.arrays(number, count):  # which may fail at once
            ready.put(_pickled(pack(arrays)))
    except Exception as error:
        return _portable(error)
    return None


class _ToParent(QueueHandler):
    """Log records are the parent's to show, in its way."""

    queue: queue.Queue[bytes]

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.put(_pickled(record))


def _write(ready: queue.Queue[bytes], out: IO[bytes]) -> None:
    with suppress(BrokenPipeError):
        while True:
            data = ready.get()
            out.write(_LENGTH.pack(len(data)))
            out.write(data)
            out.flush()
    os._exit(0)


def _listen(passes: queue.Queue[bytes]) -> None:
    while byte := sys.stdin.buffer.read(1):
        passes.put(byte)
    os._exit(0)


def _pickled(item: object) -> bytes:
    return pickle.dumps(item, protocol=5)


def _portable(error: Exception) -> Exception:
    """The exception, if it can be pickled, with where it was raised as a note; else its traceback."""
    told = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"in a process that prepares batches:\n{told}")
    error.add_note(f"In a process that prepares batches:\n{told}")
    return error
