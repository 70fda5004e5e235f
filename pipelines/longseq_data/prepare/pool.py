"""Work shared by processes: tasks are handed out as fast as they are done, and no process outlives its parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from multiprocessing import connection
from typing import Generic, TypeVar

from longseq_data.errors import DataError

ENDING = 10  # seconds that processes have to end

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """``count`` processes, started when first needed; one is this process. A context manager: it ends them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[multiprocessing.process.BaseProcess] = set()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            tasks = self._pool._call_queue  # type: ignore[attr-defined]
            self._pool.shutdown(wait=False, cancel_futures=True)
            children = set(multiprocessing.active_children()) - self._others
            for child in children:
                child.terminate()
            for child in children:  # what they leave behind can then be removed
                child.join(ENDING)
            # Before Python 3.11.5 the thread that was handing over a task, to processes that are gone, would wait for
            # ever, and the end of this process for it (https://github.com/python/cpython/issues/94777).
            if sys.version_info < (3, 11, 5):
                tasks._reader.close()

    def share(
        self, work: Callable[[Item], Result], items: Iterable[Item], most: int | None = None
    ) -> Iterator[tuple[Item, Result]]:
        """``work(item)`` for all items: (item, result), in the order in which they are done.

        ``work`` and the items are pickled. At most one item more than there are processes is under way. With
        ``most=1`` no process is used. The exception of an item is raised here. Raises DataError where a process was
        killed.
        """
        if 1 in (self.count, most):
            for item in items:
                yield item, work(item)
            return
        pending: dict[Future[Result], Item] = {}
        try:
            for item in items:
                pending[self._started().submit(work, item)] = item
                if len(pending) > self.count:
                    yield from _done(pending)
            while pending:
                yield from _done(pending)
        except BrokenProcessPool:
            raise DataError(
                "A worker process was killed, perhaps because memory ended; lower workers or memory_mb, and start the "
                "same command again: it goes on."
            ) from None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            # A fork of this process would inherit the locks of its threads in whatever state they are. The server
            # imports once what every worker needs.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["longseq_data.prepare.reduce_stage", "pyarrow"])
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_begin)
        return self._pool


def _done(pending: dict[Future[Result], Item]) -> Iterator[tuple[Item, Result]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def _begin() -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C reaches every process; one of them speaks
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class _End(Generic[Item]):
    """The last word of a thread: its exception, if there was one."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def in_threads(sequences: Sequence[Callable[[], Iterator[Item]]], threads: int) -> Iterator[Item]:
    """The items of several iterators, ``threads`` of which are read at a time, each in a thread of its own.

    Decompression and hashing let other threads run. The exception of an iterator is raised here.
    """
    if threads <= 1 or len(sequences) == 1:
        for sequence in sequences:
            yield from sequence()
        return
    waiting = iter(sequences)
    taking = threading.Lock()
    stop = threading.Event()
    ready: queue.Queue[Item | _End] = queue.Queue(maxsize=1)

    def put(item: Item | _End) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            while not stop.is_set():
                with taking:
                    sequence = next(waiting, None)
                if sequence is None:
                    put(_End())
                    return
                with closing(sequence()) as items:  # type: ignore[type-var]
                    for item in items:
                        put(item)
                        if stop.is_set():
                            return
        except BaseException as error:
            put(_End(error))

    running = min(threads, len(sequences))
    for _ in range(running):
        threading.Thread(target=read, daemon=True).start()
    try:
        while running:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                running -= 1
            else:
                yield item
    finally:
        stop.set()
