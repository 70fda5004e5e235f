from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from corpora import write_files
from downloads import CONTENT, PATH, PROMISE, QUICK
from every_format import make, trained  # noqa: F401 - fixtures
from ingesting import cache, counted, small  # noqa: F401 - fixtures
from longseq_data.fetch.download import Patience, download
from longseq_data.fetch.partial import Promise
from longseq_data.prepare import prepare as preparing
from longseq_data.prepare import reduce_stage
from longseq_data.samples.streaming import StreamSpec
from uniprot_server import File, Server, serve

LETTERS = "ACDEFGHIKLMNPQRSTVWYX"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, content): a file in tmp_path; gives its path as text."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def proteins(write: Callable[..., str]) -> list[str]:
    """Two FASTA files, 23 and 14 records of 1 to 40 residues in lines of 7."""
    rng = random.Random(3)
    sources = []
    for name, records in (("first", 23), ("second", 14)):
        text = ""
        for i in range(records):
            sequence = "".join(rng.choices(LETTERS, k=rng.randint(1, 40)))
            text += f">{name}_{i} protein {i}\n"
            text += "".join(sequence[j : j + 7] + "\n" for j in range(0, len(sequence), 7))
        sources.append(write(f"{name}.fasta", text))
    return sources


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three FASTA files, 9,000 records, about one megabyte. Not to be changed."""
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a source and several shards a split, of a corpus of one megabyte."""
    monkeypatch.setattr(preparing, "SMALLEST_BLOCK", 60_000)
    monkeypatch.setattr(preparing, "ALONE", 0)
    monkeypatch.setattr(reduce_stage, "SHARD_BYTES", 200_000)


@pytest.fixture
def make_spec(proteins: list[str]) -> Callable[..., StreamSpec]:
    """make_spec(key=value, ...): a small StreamSpec over ``proteins``."""

    def make_spec(**changes: object) -> StreamSpec:
        values: dict[str, object] = {
            "sources": tuple(proteins),
            "split": None,
            "valid_fraction": 0.2,
            "test_fraction": 0.1,
            "length": 11,
            "packing": "crop",
            "objective": "causal",
            "seed": 5,
            "shuffle_buffer": 8,
        }
        return StreamSpec(**{**values, **changes})  # type: ignore[arg-type]

    return make_spec


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def http_address(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in tmp_path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


# One file over HTTP: see downloads.


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        server.files[PATH] = File(CONTENT)
        yield server


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def get(server: Server, tmp_path: Path, said: list[str]):
    """get(promise=..., patience=...): download the file as tmp_path/file.gz; bytes transferred."""

    def get(promise: Promise = PROMISE, patience: Patience = QUICK, url: str = "", **settings: object) -> int:
        url = url or server.address + PATH
        return download(url, tmp_path / "file.gz", promise, patience=patience, notice=said.append, **settings)

    return get
