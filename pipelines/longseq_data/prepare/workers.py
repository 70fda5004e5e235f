"""Who does the work: this process, or Dask's workers here and on other nodes. What a killed one had is done again."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longseq_data.errors import DataError
from longseq_data.files import write_text
from longseq_data.ingest.cache import read_json

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

AHEAD = 2  # tasks for each worker, so that none waits for its next one
PATIENCE = 300.0  # seconds that a node waits for the one that schedules
KEYS = ("ca_file", "client_cert", "client_key", "scheduler_cert", "scheduler_key", "worker_cert", "worker_key")
LOOK = 0.5  # seconds between looks at whether it is still there
IMPORTED = ("distributed.nanny", "longseq_data.prepare.reduce_stage", "pyarrow")  # once, for all workers of a machine
SETTINGS = {
    "DASK_LOGGING__DISTRIBUTED": "critical",  # what goes wrong is raised
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "60s",  # of a node whose power has failed
    "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver",  # imports once what every worker needs
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "false",  # a hundred looks at the stack a second
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",  # every process looks at its clock fifty times a second else
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Nodes:
    """Nodes that share the work of one preparation, and a disk.

    nodes: how many. address: of the one that schedules. file: where it says how to reach it, and with which key; for
    its owner alone. start: no two are alike.
    """

    nodes: int
    address: str
    file: Path
    start: str


class Workers:
    """``count`` processes per node, started when first needed; one is this process. A context manager: it ends them.

    nodes: others that help, see ``help_out``. tell: gets a sentence about where the work can be watched.
    """

    def __init__(self, count: int, tell: Callable[[str], object], nodes: Nodes | None = None) -> None:
        self.count = count * (nodes.nodes if nodes else 1)
        self._tell, self._nodes = tell, nodes
        self._starter = ThreadPoolExecutor(1)
        self._starting: Future[Client] | None = None
        self._cluster: LocalCluster | None = None

    def __enter__(self) -> Workers:
        if self._nodes is not None:
            self._start().result()
        return self

    def __exit__(self, *_: object) -> None:
        self._starter.shutdown()
        if self._starting is not None and self._starting.exception() is None:
            self._starting.result().close()
        if self._cluster is not None:
            self._cluster.close()

    def share(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        brief: Callable[[Item], bool] = lambda item: False,
    ) -> Iterator[tuple[Item, Result]]:
        """``work(item)`` for all items: (item, result), in the order in which they are done.

        ``work`` and the items are pickled, and ``work`` may be done twice. At most AHEAD items for each worker are
        under way. brief: an item that this process may do while the others start. The exception of an item is raised
        here. Raises DataError for one that has killed several workers.
        """
        starting = None if self.count == 1 else self._start()
        for item in (rest := iter(items)):
            if starting is not None and (starting.done() or not brief(item)):
                yield from self._shared(starting.result(), work, chain([item], rest))
                return
            yield item, work(item)

    def _shared(
        self, client: Client, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        from distributed import KilledWorker, as_completed

        under_way = as_completed()
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

    def _start(self) -> Future[Client]:
        if self._starting is None:
            # Ctrl-C reaches every process, and one of them speaks: the others inherit what is blocked in their
            # starter. Their tracker of resources would unblock it when it is started.
            resource_tracker.ensure_running()
            self._starting = self._starter.submit(self._started)
        return self._starting

    def _started(self) -> Client:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        _settle()
        from distributed import Client, LocalCluster, Security

        watched = find_spec("bokeh") is not None
        host = "127.0.0.1" if self._nodes is None else self._nodes.address
        # Whoever can speak to a port of Dask can run programs: only who has the key of this run can.
        security = Security.temporary()
        self._cluster = LocalCluster(
            n_workers=self.count // (self._nodes.nodes if self._nodes else 1),
            threads_per_worker=1,
            memory_limit=0,
            host=host,
            security=security,
            dashboard_address=f"{host}:0",
        )
        client = Client(self._cluster, security=security)
        if watched:
            self._tell(f"watch the work at {client.dashboard_link}")
        if self._nodes is not None:
            keys = {name: getattr(security, f"tls_{name}") for name in KEYS}
            where = {"start": self._nodes.start, "address": self._cluster.scheduler_address, "keys": keys}
            _write_secret(self._nodes.file, json.dumps(where))
        return client


def _settle() -> None:
    """What Dask's processes take over, unless somebody has set it otherwise."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if os.environ["DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD"] == "forkserver":
        # It imports while this process imports Dask, which would have both import pandas too.
        multiprocessing.set_forkserver_preload([*IMPORTED])
        forkserver.ensure_running()
        import distributed.utils

        distributed.utils._forkserver_preload_set = True
    import dask

    dask.config.refresh()


def help_out(nodes: Nodes, count: int) -> None:
    """Work with ``count`` processes for the node that schedules, until it needs no more.

    Raises DataError where it does not come.
    """
    deadline = time.monotonic() + PATIENCE
    while (where := read_json(nodes.file)).get("start") != nodes.start:
        if time.monotonic() > deadline:
            raise DataError(f"{nodes.file}: the node that schedules has not come in {PATIENCE:g} s; see its messages.")
        time.sleep(LOOK)
    if not where["address"]:
        return
    _settle()
    from distributed.utils import get_ip

    from distributed import Nanny, Security, Status

    security = Security(require_encryption=True, **{f"tls_{name}": key for name, key in where["keys"].items()})
    host, port = where["address"].rpartition("/")[2].rsplit(":", 1)
    options: dict[str, Any] = {"nthreads": 1, "memory_limit": 0, "death_timeout": 60, "dashboard": False}
    options |= {"security": security, "host": get_ip(host.strip("[]"), int(port))}  # reached there, and nowhere else

    async def work() -> None:
        helpers = [Nanny(where["address"], **options) for _ in range(count)]
        begun = asyncio.gather(*helpers, return_exceptions=True)
        while read_json(nodes.file) == where:
            await asyncio.sleep(LOOK)
            if begun.done() and all(each.status != Status.running for each in helpers):
                break
        await asyncio.gather(*(each.close(timeout=5) for each in helpers), return_exceptions=True)

    asyncio.run(work())


def _write_secret(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    aside.replace(path)


def send_home(nodes: Nodes) -> None:
    """Tell those that help out, or wait to, that there is nothing more to do."""
    write_text(nodes.file, json.dumps({"start": nodes.start, "address": ""}))
    time.sleep(4 * LOOK)
    nodes.file.unlink(missing_ok=True)
