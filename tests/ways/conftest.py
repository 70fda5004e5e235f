from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from longseq.cli import main
from longseq.errors import LongseqError
from longseq.launch import local
from longseq.models.compiling import compile_blocks
from longseq.runs.run import Run
from longseq.training import fit, signs, task, worker
from longseq.training.vitals import Vitals
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
    """A training of one process runs in this one: its imports take ten times as long as a few tiny steps.

    It is what the worker does in a process of its own; those are started by tests/distributed.
    """
    import torch

    def train(
        run: Run, devices: int, checkpoint: Path | None, origin: Path | None = None, *, rehearse: bool = False
    ) -> int:
        assert devices == 1
        assert not rehearse
        with _unchanged(), warnings.catch_warnings():
            code, sentence = worker.outcome(lambda: worker._train(run, checkpoint, origin, Vitals()), run)
        if sentence:
            raise LongseqError(sentence)
        return code

    monkeypatch.setattr(local, "train", train)
    # What torch.compile makes of the blocks, without the C++ compiler behind it: tests/distributed/test_compile.py.
    monkeypatch.setattr(task, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    monkeypatch.setattr(fit, "missing_compiler", lambda device: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or programs of other ways would count


@contextmanager
def _unchanged() -> Iterator[None]:
    """A worker takes signals and quiets libraries for the rest of its process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signs.STOP_SIGNAL)
    handlers = {number: signal.getsignal(number) for number in numbers}
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
