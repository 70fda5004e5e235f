"""Runs the parts, each in a process with a limit of its own, and keeps what is known in one JSON file all along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import longseq
import longseq_data
from longseq.benchmarks.gpu.parts import Part
from longseq.benchmarks.gpu.rows import Row, read_rows
from longseq_data.files import write_text

WAITING, RUNNING, PASSED, MEASURED, FAILED = "waiting", "running", "passed", "measured", "failed"
SKIPPED, CRASHED, CUT, NO_TIME = "skipped", "crashed", "cut", "no time"
_LEAST_SECONDS = 10.0  # less is not worth a start
_CORRECT_SHARE = 0.6  # of all the time, at most: the rest is for what takes times
_POLL_SECONDS = 0.1
_TAIL = 2000  # letters of a part's output that are kept


@dataclass
class Found:
    """A part, how it ended, and what it found."""

    part: Part
    state: str = WAITING
    seconds: float = 0.0
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    output: str = ""

    @property
    def bad(self) -> bool:
        """Whether the command must say by its exit code that something is wrong."""
        return self.part.correct and (self.state == FAILED or self.unfinished)

    @property
    def unfinished(self) -> bool:
        """Whether it did not come to its end."""
        return self.state in (WAITING, RUNNING, CRASHED, CUT, NO_TIME)

    def as_dict(self) -> dict[str, object]:
        about = {"name": self.part.name, "about": self.part.about, "correctness": self.part.correct}
        ended = {"state": self.state, "seconds": round(self.seconds, 1), "why": self.why}
        return {**about, **ended, "rows": [asdict(row) for row in self.rows], "output": self.output}


@dataclass
class Running:
    """The process of a part."""

    found: Found
    process: subprocess.Popen[bytes]
    began: float
    limit: float
    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / f"{self.found.part.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.found.part.name}.log"


class Runner:
    """Runs parts until all are done or the time is over.

    Args:
        device: "cpu" or "cuda".
        seconds: for all parts together.
        jobs: parts that run at a time, but for those that take times.
        folder: for what the parts leave each other, their rows and output; its path is short-lived.
        keep: is called with all that is known whenever there is something new.
        say: is called with each part that has ended.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        device: str,
        *,
        seconds: float,
        jobs: int,
        folder: Path,
        keep: Callable[[Sequence[Found]], None],
        say: Callable[[Found], None],
    ):
        self.found = [Found(part) for part in parts]
        self._device, self._jobs, self._folder, self._keep, self._say = device, jobs, folder, keep, say
        self._end = time.monotonic() + seconds
        timed = any(found.part.alone for found in self.found)
        self._end_of_shared = self._end - (seconds * (1 - _CORRECT_SHARE) if timed else 0.0)
        self._running: list[Running] = []

    def run(self) -> None:
        """Run them all. Whatever happens, no process of a part outlives this."""
        read_end, write_end = os.pipe()
        try:
            waiting = list(self.found)
            self._keep(self.found)
            while waiting or self._running:
                while waiting and self._may_start(waiting[0]):
                    self._start(waiting.pop(0), read_end)
                    self._keep(self.found)
                time.sleep(_POLL_SECONDS)
                if self._look():
                    self._keep(self.found)
        finally:
            for running in self._running:
                self._kill(running)
                self._take(running, CUT, "the benchmark was stopped")
            os.close(write_end)
            os.close(read_end)
            self._keep(self.found)

    def _may_start(self, found: Found) -> bool:
        alone = found.part.alone or any(running.found.part.alone for running in self._running)
        return not self._running if alone else len(self._running) < self._jobs

    def _start(self, found: Found, parent_pipe: int) -> None:
        now, part = time.monotonic(), found.part
        limit = min(part.seconds, (self._end if part.alone else self._end_of_shared) - now)
        if limit < _LEAST_SECONDS:
            found.state, found.why = NO_TIME, "the time for all parts was over (--minutes)"
            self._say(found)
            return
        command = [sys.executable, "-m", part.program, part.name, str(self._folder / f"{part.name}.jsonl")]
        command += ["--device", self._device, "--folder", str(self._folder), "--parent-pipe", str(parent_pipe)]
        with (self._folder / f"{part.name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=_environment(self._device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own, to be ended with all that it starts
                pass_fds=(parent_pipe,),
            )
        found.state = RUNNING
        self._running.append(Running(found, process, now, limit, self._folder))

    def _look(self) -> bool:
        """Take what has ended, end what takes too long, and read what others have found. Whether anything is new."""
        new = False
        for running in list(self._running):
            code, found = running.process.poll(), running.found
            found.seconds = time.monotonic() - running.began
            if code is not None:
                self._kill(running)  # what it may have left
                self._take(running, *_how(code, read_rows(running.rows), found.part))
                if found.state == CRASHED and found.output.strip():
                    found.why += f": {found.output.strip().splitlines()[-1][:300]}"
            elif found.seconds > running.limit:
                self._kill(running)
                self._take(running, CUT, f"not done after {running.limit:.0f} s")
            else:
                rows = read_rows(running.rows)
                new = new or len(rows) != len(found.rows)
                found.rows = rows
                continue
            self._running.remove(running)
            self._say(found)
            new = True
        return new

    def _take(self, running: Running, state: str, why: str) -> None:
        found = running.found
        found.state, found.why, found.rows = state, why, read_rows(running.rows)
        with suppress(OSError):  # output is for people
            found.output = running.log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]

    def _kill(self, running: Running) -> None:
        with suppress(ProcessLookupError):  # all of its group have ended
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


def _how(code: int, rows: Sequence[Row], part: Part) -> tuple[str, str]:
    """State of a part that ended by itself, and why."""
    if code:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return CRASHED, how
    unmet = [row for row in rows if row.met is False]
    if unmet and part.correct:
        return FAILED, f"{len(unmet)} of {len(rows)} not as it must be"
    if not rows:
        return FAILED, "it found nothing"
    if all(row.seen is None and row.met is None for row in rows):
        return SKIPPED, ""
    return PASSED if part.correct else MEASURED, ""


def _environment(device: str) -> Mapping[str, str]:
    """That of a part: this one's, in which the package is found wherever the part works."""
    roots = [Path(module.__file__).parents[1] for module in (longseq, longseq_data) if module.__file__]
    given = [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = dict.fromkeys(str(path.resolve()) for path in (*given, *roots))
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""  # `auto` in a configuration must mean this device
        found["TRITON_INTERPRET"] = "1"
    return found


def write_json(path: Path, numbers: Mapping[str, object]) -> None:
    """Replace a file as a whole: whoever is killed on the way leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
