"""Small sources, streams over them, and a server that counts, for the tests of reading."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from longseq_data.samples.rank_share import Share
from longseq_data.samples.streaming import StreamSpec


def fasta(name: str, records: int, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    return "".join(f">{name}_{i}\n{''.join(draw.choices('ACDEFGHIKL', k=300))}\n" for i in range(records)).encode()


def spec_of(*sources: str, cache: Path | None = None, **settings) -> StreamSpec:
    values = {"split": "train", "valid_fraction": 0.05, "test_fraction": 0.05, "length": 64, "packing": "concat"}
    values |= {"objective": "causal", "seed": 3, "shuffle_buffer": 50, **settings}
    return StreamSpec(sources, cache=None if cache is None else str(cache), **values)


def batches(spec: StreamSpec, count: int = 30, start: int = 0, **share: int) -> list[bytes]:
    share = {"batch_sequences": 4, "accumulate": 1, "rank": 0, "world": 1, **share}
    made = (make() for make in islice(spec.training(start, Share(**share)), count))
    return [b"".join(batch[name].astype("<i8").tobytes() for name in sorted(batch)) for batch in made]


class Counting(SimpleHTTPRequestHandler):
    """Files, and how many bytes of them were asked for."""

    sent: list[int]
    pause = 0.0
    ends: threading.Event | None = None  # waited for before a file's last piece

    def log_message(self, *arguments: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        with suppress(ConnectionError):  # of a client that was killed
            while piece := source.read(1 << 14):
                if self.ends and len(piece) < 1 << 14:
                    self.ends.wait(120)
                self.sent.append(len(piece))
                outputfile.write(piece)
                time.sleep(self.pause)


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[str, list[int], type[Counting]]]:
    sent: list[int] = []
    handler = type("Handler", (Counting,), {"sent": sent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", sent, handler
    server.shutdown()
    server.server_close()


READER = """
import sys
from itertools import islice
from longseq_data.samples.rank_share import Share
from longseq_data.samples.streaming import StreamSpec
url, cache, rank, world = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4])
spec = StreamSpec((url,), None, 0.0, 0.0, 64, "concat", "causal", 3, shuffle_buffer=50, cache=cache)
for make in islice(spec.training(0, Share(4, 1, rank, world)), 2000 // world):
    make()
"""


def read_together(url: str, cache: Path | str, world: int) -> None:
    """Two epochs, in processes of their own."""
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, url, str(cache), str(rank), str(world)])
        for rank in range(world)
    ]
    assert [reader.wait(120) for reader in readers] == [0] * world


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of a small file, of those that this process makes."""
    monkeypatch.setattr("longseq_data.ingest.block.FIRST_BYTES", 1000)
    monkeypatch.setattr("longseq_data.ingest.block.MOST_BYTES", 4000)
