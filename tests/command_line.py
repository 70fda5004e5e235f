"""The ``longseq`` command as a person types it, in processes of its own, and what tests read from its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import warm

LONGSEQ = Path(sys.executable).with_name("longseq")


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str
    seconds: float  # from the last moment the test acted on it

    @property
    def sentence(self) -> str:
        """The one error line that the command must end with, and no traceback anywhere."""
        assert "Traceback" not in self.out + self.err, self.out + self.err
        *before, last = self.err.strip().splitlines()
        assert last.startswith("longseq: error: "), self.err
        assert not any(line.startswith("longseq: error: ") for line in before), self.err
        return last.removeprefix("longseq: error: ")


class Command:
    """A ``longseq`` command under way, in a session of its own as a terminal would give it."""

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        environment: dict[str, str] | None = None,
        inside: Sequence[str] = (),
        timeout: float = 150,
        start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    ):
        self.out, self.err = folder / ".out", folder / ".err"
        self.acted = time.monotonic()
        self.deadline = self.acted + timeout
        command = [*inside, str(LONGSEQ), *map(str, arguments)]
        # One thread a process: tiny matrices gain nothing from a second, and sums are then added in one order.
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = start(command, cwd=folder, env=settings, stdout=out, stderr=err, start_new_session=True)

    def wait_for(self, text: str) -> None:
        """Until the command has printed ``text`` on stderr."""
        while text not in self.err.read_text():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.err.read_text()}"
            assert time.monotonic() < self.deadline, f"no {text!r} in time:\n{self.err.read_text()}"
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """Process ids of the training processes, by rank: not the one that reads the sources."""
        pid = self.process.pid
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        # a child that has ended has no command, and between vfork and exec one has its parent's
        others = (b"", _command(pid))
        found = {child: _command(child) for child in children}
        return [child for child, its in found.items() if its not in others and b"longseq_data.ingest" not in its]

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the terminal's foreground group."""
        self.acted = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self, pid: int) -> None:
        self.acted = time.monotonic()
        os.kill(pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Wait for the end."""
        try:
            code = self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()  # its training processes end with it
            self.process.wait()
            raise AssertionError(f"did not end in time:\n{self.err.read_text()}") from None
        return Ended(code, self.out.read_text(), self.err.read_text(), time.monotonic() - self.acted)


def longseq(*arguments: object, folder: Path, **settings: object) -> Ended:
    """Run a command to its end, see ``warm``; in processes started anew where they get another environment."""
    if not {"environment", "inside"} & settings.keys() and warm.seed():
        settings["start"] = warm.Process
    return Command(*arguments, folder=folder, **settings).end()  # type: ignore[arg-type]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def curve(run: Path, tag: str) -> dict[int, float]:
    """One of a run's curves as TensorBoard shows it. Fails where a step has two points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(tag)
    steps = [point.step for point in points]
    assert steps == sorted(set(steps)), f"{tag}: steps {steps}"
    return {point.step: point.value for point in points}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints under a final name, oldest first."""
    return sorted(int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*.ckpt"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def weights_checksum(run: Path, step: int) -> str:
    manifest = json.loads((checkpoint(run, step) / "manifest.json").read_text())
    return manifest["files"]["model.safetensors"]["sha256"]
