"""Checkpoints written during the training, one at a time, and named when every rank's part is on the disk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longseq.runs.checkpoint import TrainingPosition, partial_path, publish
from longseq.runs.run import Run
from longseq.training.shards import Content, write
from longseq_data.os_errors import remedy, said

_POLL_SECONDS = 0.02


class Writer:
    """Writes this rank's files in a thread; rank 0's then waits for the others' and publishes the checkpoint.

    The ranks meet through files in the unfinished folder, not through collectives, which belong to the training.
    """

    def __init__(self, run: Run, rank: int, world_size: int, publish_then: Callable[[], None]):
        self.run, self.directory = run, run.checkpoints_dir
        self.rank, self.world_size = rank, world_size
        self.publish_then = publish_then  # rank 0, once a checkpoint has its name
        self.error: Exception | None = None
        self.step: int | None = None  # being written
        self._part: threading.Thread | None = None
        self._publication: threading.Thread | None = None
        self._given_up = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether something could not be written; known at once, without waiting."""
        return self.error is not None

    @property
    def reason(self) -> str | None:
        """Why not."""
        if isinstance(self.error, OSError):
            return f"{said(self.error)}; {remedy(self.error)}"
        return f"{type(self.error).__name__}: {self.error}" if self.error else None

    def start(
        self, files: Mapping[str, Content], position: TrainingPosition, made: Callable[[], None] = lambda: None
    ) -> None:
        """Begin to write ``files`` (path in the checkpoint: content), which must not change once ``made`` returns."""
        assert self._part is None, "the one before is not finished"
        self.step = position.step
        self._part = threading.Thread(target=self._write_part, args=(files, position.step, made), daemon=True)
        self._part.start()
        if self.rank == 0:
            self._publication = threading.Thread(target=self._publish, args=(position,), daemon=True)
            self._publication.start()

    def finish_part(self) -> None:
        """Wait until this rank's own files are written, or could not be."""
        if self._part is not None:
            self._part.join()

    def finish(self, timeout: float | None = None) -> None:
        """Wait for everything this rank does. Rank 0 waits for the other ranks' files: let all finish theirs first."""
        self.finish_part()
        if self._publication is not None:
            self._publication.join(timeout)
            self._given_up.set()
            self._publication.join()
        self._given_up.clear()
        self._part = self._publication = self.step = None

    def give_up(self) -> None:
        """Stop waiting for ranks that cannot write their files."""
        self._given_up.set()

    def _write_part(self, files: Mapping[str, Content], step: int, made: Callable[[], None]) -> None:
        partial = partial_path(self.directory, step, self.run.start)
        try:
            made()
            written = {}
            for name, content in files.items():
                self.run.check_start()
                written[name] = asdict(write(partial / name, content))
            # Seen by rank 0 when it is whole: it appears by its renaming.
            aside = partial / f".part-{self.rank}.partial"
            write(aside, json.dumps(written).encode())
            aside.rename(self._note(partial, self.rank))
        except Exception as error:  # whatever it is, the training must hear of it
            self.error = error

    def _publish(self, position: TrainingPosition) -> None:
        partial = partial_path(self.directory, position.step, self.run.start)
        notes = [self._note(partial, rank) for rank in range(self.world_size)]
        try:
            # A listing asks the server of a network file system anew; a look for one name may not.
            while not {note.name for note in notes} <= {path.name for path in partial.iterdir()}:
                if self._given_up.is_set() or self.failed:
                    return
                time.sleep(_POLL_SECONDS)
            files: dict[str, dict[str, Any]] = {}
            for note in notes:
                files |= json.loads(note.read_text())
                note.unlink()
            publish(self.directory, position, files, self.run.start, self.run.check_start)
            self.run.check_start()
            self.publish_then()
        except Exception as error:
            self.error = error

    @staticmethod
    def _note(partial: Path, rank: int) -> Path:
        return partial / f".part-{rank}.json"
