"""Work on a file's records in shards: dealt out to processes, kept as each is finished, put together in their order.

A shard is a run of batches, and its results are the same whoever computes it and when: so they do not depend on the
number of processes, and a start that finds the shards of an earlier one does not compute them again. A process that is
lost costs its shard.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import BufferedReader
from itertools import count, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

from longseq.errors import LongseqError, PassingError
from longseq.evaluation.losses import SHARD, Losses, replace_lost
from longseq.evaluation.nodes import Nodes, let_go
from longseq.launch.workers import Workers
from longseq.runs import starts
from longseq.trained_model import Source, find
from longseq_data.errors import DataError
from longseq_data.files import aside, write_text
from longseq_data.os_errors import lock

if TYPE_CHECKING:
    from longseq.models.performer import PerformerLM

JOB = "job.json"
_LOCK = ".lock"
_END = "{mark}-end-{rank}.txt"
_FORMAT = 2  # of what is kept
_LOOK = 0.05  # seconds
_GROWS_EVERY = 128  # shards are of one batch at first, so that all processes end at about the same time, and then
_LARGEST = 256  # twice as large after every so many, up to this: a file for each batch of a proteome would be too many
_PATIENCE = 120.0  # seconds for a lost node's lock on a job's shards

Group = TypeVar("Group")
Row = TypeVar("Row")


@dataclass(frozen=True)
class Job:
    """What is to be done, as processes are told it and a later start compares it."""

    kind: str  # of longseq.evaluation.work
    folder: str
    file: str
    overrides: tuple[str, ...] = ()
    ema: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """What is read: the sequences, a table of variants, their relatives."""
        others = self.options.get("table"), next(iter(self.options.get("context", ())), None)
        return [Path(self.file), *(Path(other) for other in others if other)]

    @staticmethod
    def read(place: Path) -> Job:
        values = json.loads((place / JOB).read_text(encoding="utf-8"))["job"]
        return Job(**{**values, "overrides": tuple(values["overrides"])})


class Work(Generic[Group, Row]):
    """One kind of job: its batches, what is made of one, and how rows are kept. Kept as JSON, a row a line."""

    grows = True  # whether later shards are of more batches

    def __init__(self, job: Job, source: Source | None = None):
        self.job = job
        self.source = source or find(job.folder, job.overrides, ema=job.ema, sums=False)

    @cached_property
    def model(self) -> PerformerLM:
        return self.source.load()

    def groups(self) -> Iterator[Group]:
        """What the model reads at once, in the order of the results."""
        raise NotImplementedError

    def rows(self, group: Group) -> list[Row]:
        raise NotImplementedError

    def write(self, file: IO[bytes], rows: list[Row]) -> None:
        """Those of one batch, behind others."""
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)

    def read(self, file: BufferedReader) -> Iterator[Row]:
        """All that were written."""
        yield from map(json.loads, file)


def refuse_devices(devices: int) -> None:
    """Raise LongseqError for less than one."""
    if devices < 1:
        raise LongseqError(f"devices={devices}: take 1 or more.")


def done(work: Work[Group, Row], devices: int) -> Iterator[Row]:
    """All rows in their order. Of one process straight away, of several by shards that nobody else needs, and of a
    job's nodes by shards that stay until their verb has ended well."""
    nodes = Nodes.here()
    if nodes:
        with kept(nodes.place, work):
            yield from results(nodes.place, work, devices)
        return
    if devices == 1:
        for group in work.groups():
            yield from work.rows(group)
        return
    with tempfile.TemporaryDirectory(prefix="longseq-shards-") as folder, kept(Path(folder) / "shards", work):
        yield from results(Path(folder) / "shards", work, devices)


@contextmanager
def kept(place: Path, work: Work[Group, Row]) -> Iterator[None]:
    """The folder of a job's shards: those of the same job stay, any others go. It goes when the block ends well, or of
    nodes when their verb does, for bad data, and where nothing is in it; else it waits for the next start.

    Raises:
        LongseqError: if another process has it.
        SupersededError: where a newer start of the job has it.
    """
    place.mkdir(exist_ok=True)
    nodes = Nodes.here()
    with (place / _LOCK).open("a") as file:
        _take(file, place, time.monotonic() + (_PATIENCE if nodes else 0))
        facts = [_FORMAT, _facts(work.source.weights), *map(_facts, work.job.files)]
        told, text = place / JOB, json.dumps({"job": asdict(work.job), "of": facts}, indent=1) + "\n"
        starts.check_own()
        same = told.is_file() and told.read_text(encoding="utf-8") == text
        found = len(list(place.glob(f"*{SHARD}")))
        if found:
            what = f"going on behind {found} shards" if same else f"note: removing {found} shards of another job"
            print(f"longseq: {what} in {place}", file=sys.stderr)
        _empty(place, but=SHARD if same else "")
        write_text(told, text)
        if nodes:
            nodes.begin()
        useful = True
        try:
            yield
            useful = nodes is not None
        except DataError:  # once it is corrected the shards are another file's
            useful = False
            raise
        finally:
            if not useful or not any(place.glob(f"*{SHARD}")):
                let_go(place)


def results(place: Path, work: Work[Group, Row], devices: int) -> Iterator[Row]:
    """All rows in their order, as soon as they are there, from a folder that is ``kept``.

    Raises:
        LongseqError, DataError: what went wrong, in one sentence. Shards that were finished stay.
    """
    mark, nodes = _mark(place), Nodes.here()
    if devices == 1 and nodes is None:
        for number, groups in enumerate(_shards(work)):
            yield from _read(_finish(place / f"{mark}-{number:06}{SHARD}", work, groups), work)
        return
    with Workers("longseq.evaluation.worker", place, devices, 0, nodes.nodes if nodes else 1) as workers:
        losses, number = Losses(), 0
        ends = [place / _END.format(mark=mark, rank=rank) for rank in range(workers.world)]
        while True:
            path = place / f"{mark}-{number:06}{SHARD}"
            if path.exists():
                yield from _read(path, work)
                number += 1
            elif number == _total(ends):  # asked where a shard is missing, and not once for each
                break
            else:
                replace_lost(workers, losses)
                time.sleep(_LOOK)
        while nodes and not all(end.exists() for end in ends):
            replace_lost(workers, losses)  # none may find its folder gone
            time.sleep(_LOOK)


def take_part(place: Path, rank: int, world: int, work: Work[Group, Row]) -> None:
    """A process's own shards, and then how many there are of all."""
    mark, total = _mark(place), 0
    for number, groups in enumerate(_shards(work)):
        total += 1
        if number % world == rank:
            _finish(place / f"{mark}-{number:06}{SHARD}", work, groups)
    write_text(place / _END.format(mark=mark, rank=rank), str(total))


def _shards(work: Work[Group, Row]) -> Iterator[list[Group]]:
    """Runs of batches."""
    groups = work.groups()
    for number in count():
        size = min(_LARGEST, 2 ** (number // _GROWS_EVERY)) if work.grows else 1
        shard = list(islice(groups, size))
        if not shard:
            return
        yield shard


def _finish(path: Path, work: Work[Group, Row], groups: Iterable[Group]) -> Path:
    """The file of a shard, made if it is not there. A file of this name is whole."""
    if not path.exists():
        with aside(path) as partial, partial.open("wb") as file:
            for group in groups:
                work.write(file, work.rows(group))
    return path


def _read(path: Path, work: Work[Group, Row]) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from work.read(file)


def _take(file: IO[str], place: Path, deadline: float) -> None:
    while True:
        try:
            return lock(file, place)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                kind = PassingError if Nodes.here() else LongseqError
                raise kind(f"{place}: another process writes there; wait for it, or choose another name.") from None
        time.sleep(1.0)


def _mark(place: Path) -> str:
    """What a job's files begin with. Taken once: what a process of an earlier job still writes is nothing of this."""
    return hashlib.sha256((place / JOB).read_bytes()).hexdigest()[:12]


def _total(ends: Sequence[Path]) -> int | None:
    """How many shards there are, once a process has seen all."""
    return next((int(path.read_text()) for path in ends if path.exists()), None)


def _facts(path: Path) -> list[str | int]:
    """What tells a file from another of its name, as far as that can be said without reading it."""
    if not path.is_file():  # an address, or a pattern
        return [str(path)]
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _empty(place: Path, but: str = "") -> None:
    for path in place.iterdir():
        # A file that another node still has open and somebody removes is called .nfs... until it is closed.
        if path.name != _LOCK and not path.name.startswith(".nfs") and not (but and path.name.endswith(but)):
            with suppress(FileNotFoundError):  # what a process of the start before has removed meanwhile
                path.unlink()
