"""Scoring in this process, or shared by several: the same results to the last bit.

Each process scores every N-th batch and leaves what it counted in a file; here the files of all are put together in
the order of the sequences. No process waits for another, so none can hang.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from longseq.allocator import keep_freed_memory
from longseq.errors import LongseqError
from longseq.evaluation.request import Request, batch_sequences, samples_of
from longseq.evaluation.tally import Tally
from longseq.launch.workers import Workers

Progress = Callable[[int, int, int], None]  # checkpoint, part and sequences so far, about

_LOOK = 1.0  # seconds between two reports of a process


def scored(request: Request, devices: int, progress: Progress) -> Iterator[tuple[int, int, Tally]]:
    """The numbers of a folder and a part, and what was counted there, one after the other as they are done.

    Raises:
        LongseqError, DataError: what went wrong, in one sentence.
    """
    if devices == 1:
        yield from of_this_process(request, 0, 1, None, progress)
        return
    with tempfile.TemporaryDirectory(prefix="longseq-evaluate-") as folder:
        place = Path(folder)
        request.write(place / "request.json")
        with Workers("longseq.evaluation.worker", place, devices) as workers:
            for number in range(len(request.folders)):
                for part in range(len(request.parts)):
                    files = [tally_path(place, number, part, rank) for rank in range(devices)]
                    _wait(files, workers, progress)
                    yield number, part, Tally.merged([Tally.load(file) for file in files])
                    for file in files:
                        file.unlink()


def of_this_process(
    request: Request, rank: int, world: int, device: str | None, progress: Progress
) -> Iterator[tuple[int, int, Tally]]:
    """This process's share of everything."""
    import torch

    from longseq.evaluation.split_scores import score

    if not torch.cuda.is_available():
        keep_freed_memory()
    for number in range(len(request.folders)):
        source = request.source(number)
        model = source.load(device)
        for part, name in enumerate(request.parts):
            tally = score(
                model,
                samples_of(source, name),
                batch_sequences=batch_sequences(source.config),
                max_samples=request.sequences,
                top_k=request.top_k,
                rank=rank,
                world=world,
                progress=lambda sequences, part=part, number=number: progress(number, part, sequences),  # type: ignore[misc]
            )
            yield number, part, tally


def tally_path(place: Path, number: int, part: int, rank: int) -> Path:
    """Where a process leaves what it counted."""
    return place / f"{number}-{part}-{rank}.npz"


class Reports:
    """Where a process is, in a file for the one that waits; renewed at most once a second."""

    def __init__(self, place: Path, rank: int):
        self.path, self._last = _report_path(place, rank), -math.inf

    def __call__(self, number: int, part: int, sequences: int) -> None:
        if time.monotonic() - self._last < _LOOK:
            return
        self._last = time.monotonic()
        partial = self.path.with_suffix(".partial")
        with suppress(OSError):  # for people: no reason to stop
            partial.write_text(f"{number} {part} {sequences}")
            partial.replace(self.path)


def reported(place: Path, world: int) -> tuple[int, int, int] | None:
    """As far as all processes are that have said so: checkpoint, part and sequences; None: none has."""
    paths = [_report_path(place, rank) for rank in range(world)]
    found = [tuple(map(int, path.read_text().split())) for path in paths if path.exists()]
    return min(found) if found else None  # type: ignore[return-value]


def _report_path(place: Path, rank: int) -> Path:
    return place / f"progress-{rank}.txt"


def _wait(files: Sequence[Path], workers: Workers, progress: Progress) -> None:
    looked = time.monotonic()
    while not all(file.exists() for file in files):
        if time.monotonic() - looked > _LOOK:
            looked = time.monotonic()
            done = reported(workers.place, workers.world)
            if done:
                progress(*done)
        for rank, how in workers.lost(lambda rank: files[rank].exists()).items():
            raise LongseqError(
                f"evaluate: process {rank} of {workers.world} {how}; is there enough memory for that many? "
                "Take fewer devices."
            )
        time.sleep(0.05)
