"""Who does the work: this process, or Dask's workers on this machine. A task whose worker is killed is done again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, TypeVar

from longseq_data.errors import DataError

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

AHEAD = 2  # tasks for each worker, so that none waits for its next one

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """``count`` processes, started when first needed; one is this process. A context manager: it ends them.

    tell: gets a sentence about where they can be watched.
    """

    def __init__(self, count: int, tell: Callable[[str], object]) -> None:
        self.count, self._tell = count, tell
        self._client: Client | None = None
        self._cluster: LocalCluster | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._client, self._cluster):
            if each is not None:
                each.close()

    def share(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """``work(item)`` for all items: (item, result), in the order in which they are done.

        ``work`` and the items are pickled, and ``work`` may be done twice. At most AHEAD items for each worker are
        under way. The exception of an item is raised here. Raises DataError for one that has killed several workers.
        """
        if self.count == 1:
            for item in items:
                yield item, work(item)
            return
        from distributed import KilledWorker, as_completed

        client, under_way = self._started(), as_completed()
        asked: dict[object, Item] = {}
        try:
            for item in items:
                future = client.submit(work, item, pure=False)
                asked[future.key] = item
                under_way.add(future)
                del future  # or its result would be kept
                if len(asked) >= AHEAD * self.count:
                    done = next(under_way)
                    yield asked.pop(done.key), done.result()
            for done in under_way:
                yield asked.pop(done.key), done.result()
        except KilledWorker:
            raise DataError(
                "A task has killed several worker processes, perhaps because memory ended; lower workers or memory_mb, "
                "and start the same command again: it goes on."
            ) from None

    def _started(self) -> Client:
        if self._client is None:
            import dask

            watched = find_spec("bokeh") is not None
            quiet = {"logging": {"distributed": "critical"}, "distributed.worker.memory.terminate": False}
            dask.config.set(quiet)
            from distributed import Client, LocalCluster

            # Ctrl-C reaches every process, and one of them speaks: the others inherit what is blocked here. Its
            # tracker of resources would unblock it when it is started.
            resource_tracker.ensure_running()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._cluster = LocalCluster(
                    n_workers=self.count,
                    threads_per_worker=1,
                    memory_limit=0,
                    dashboard_address="127.0.0.1:0" if watched else None,
                )
                self._client = Client(self._cluster)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if watched:
                self._tell(f"watch the work at {self._client.dashboard_link}")
        return self._client
