from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longseq.cli import main
from longseq.launch import local
from longseq.training import worker
from ways import sources
from ways.sources import Source


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Source]:
    """data(kind, records): made once for all ways."""
    folder, made = tmp_path_factory.mktemp("data"), {}

    def data(kind: str, records: str) -> Source:
        if (kind, records) not in made:
            made[kind, records] = sources.make(kind, records, folder / f"{kind}-{records}")
        return made[kind, records]

    return data


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None) -> Path:
    """The current folder, an empty one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    return tmp_path


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training of one process runs in this one: what it starts with takes ten times as long as a few tiny steps.

    It is the worker's own program without its signals' end; the processes themselves are those of tests/distributed.
    """
    import torch

    def train(run, devices: int, checkpoint: Path | None, *, rehearse: bool = False) -> int:
        assert devices == 1
        assert not rehearse
        code, sentence = worker.outcome(lambda: worker._train(run, checkpoint), run)
        if sentence:
            raise local.LongseqError(sentence)
        return code

    monkeypatch.setattr(local, "train", train)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, local.STOP_SIGNAL)
    handlers, threads = {number: signal.getsignal(number) for number in numbers}, torch.get_num_threads()
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def longseq(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """longseq(word, ...): what a command prints; it must end well."""

    def longseq(*words: object) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return longseq


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(word, ...): the one sentence that a command ends with."""

    def refused(*words: object) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        assert code == 1, shown.err
        assert "Traceback" not in shown.err
        last = shown.err.strip().splitlines()[-1]
        assert last.startswith("longseq: error: ")
        return last.removeprefix("longseq: error: ")

    return refused
