"""Dask's processes speak to those alone that have the key of their run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longseq_data.prepare.workers import Nodes, Workers, send_home

HELPER = """
import sys
from pathlib import Path
from longseq_data.prepare.workers import Nodes, help_out
help_out(Nodes(2, "127.0.0.1", Path(sys.argv[1]), "this"), 1)
"""


def pid_of(item: int) -> int:
    """Who does the work."""
    import time

    time.sleep(0.05)  # so that nobody does all of it
    return os.getpid()


def test_a_stranger_cannot_speak_to_the_scheduler_nor_to_a_worker() -> None:
    with Workers(2, lambda said: None) as workers:
        done = dict(workers.share(pid_of, range(20), brief=lambda item: item in (0, 5)))
        assert sorted(done) == list(range(20))
        assert done.pop(0) == os.getpid()  # while the others start, what they need not do
        assert len({*done.values()}) == 2
        assert os.getpid() not in done.values()
        client = workers._start().result()
        addresses = [client.scheduler.address, *client.scheduler_info()["workers"]]
        assert len(addresses) == 3
        for address in addresses:
            assert address.startswith("tls://127.0.0.1:")
            for scheme in ("tcp", "tls"):
                refused(address.replace("tls", scheme, 1))


def refused(address: str) -> None:
    """A stranger with a certificate of its own, or with none, gets no answer."""
    import asyncio

    from distributed.core import rpc

    from distributed import Security

    async def ask() -> None:
        own = Security.temporary().get_connection_args("client") if address.startswith("tls") else {}
        async with rpc(address, connection_args=own, timeout=2) as other:
            await other.identity()

    with pytest.raises((OSError, TimeoutError)):
        asyncio.run(asyncio.wait_for(ask(), 5))


def test_nodes_find_the_key_in_a_file_of_its_owner_alone(tmp_path: Path) -> None:
    nodes = Nodes(2, "127.0.0.1", tmp_path / "scheduler", "this")
    helper = subprocess.Popen([sys.executable, "-c", HELPER, str(nodes.file)])
    try:
        with Workers(1, lambda said: None, nodes) as workers:
            assert nodes.file.stat().st_mode & 0o777 == 0o600
            assert json.loads(nodes.file.read_text())["address"].startswith("tls://127.0.0.1:")
            client = workers._start().result()
            client.wait_for_workers(2, timeout=60)
            assert len({pid for _, pid in workers.share(pid_of, range(40))}) == 2
            send_home(nodes)
            assert helper.wait(60) == 0
    finally:
        helper.kill()
    assert list(tmp_path.iterdir()) == []
