"""A page that follows a run: step, loss, speed, time left, job, ranks, memory, checkpoints, what the log said last.

It reads what `longseq status` and TensorBoard read, a small file at each look, and folders and SLURM's queue twice a
minute, so that many may watch a run on a shared file system. It ends when the run does, or with Ctrl-C. Where the
output is no terminal, or a dumb one (TERM), the page is printed once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longseq.commands.jobs import known
from longseq.commands.logs import log_of
from longseq.commands.status import ago, ended, head, history, in_short, kept
from longseq.errors import LongseqError
from longseq.launch.slurm.state import State, state_of
from longseq.runs import starts
from longseq.runs.curves import LiveCurves
from longseq.runs.run import Run
from longseq_data.os_errors import said

_THOROUGH_SECONDS = 30.0  # between looks that list folders and ask SLURM
_TAIL = 1 << 14  # bytes of the log in which the last messages are looked for
_STARTS, _MESSAGES = 3, 6  # the last ones
# What the page says already: lines and bars of progress.
_PROGRESS = re.compile(r"step \d+/\d+ |.*\| step \d+/\d+, ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument("--once", action="store_true", help="print the page once")
    parser.add_argument(
        "--interval", type=_seconds, default=5.0, metavar="S", help="seconds between looks, 1 or more; default: 5"
    )


def run(args: argparse.Namespace) -> int:
    viewer = Viewer(Run.open(args.run_folder))
    viewer.look()
    if args.once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", ""):
        print("\n".join(map(_printable, viewer.page())))
        return 0
    with _screen():
        while True:
            _draw(viewer.page())
            if viewer.over:
                return 0
            time.sleep(args.interval)
            viewer.look()


class Viewer:
    """What is known of a run; each look asks for what may have changed."""

    def __init__(self, run: Run):
        self.run = run
        self.curves = LiveCurves()
        self.state: State
        self.log: Path | None = None
        self.messages: list[str] = []
        self._asked = -_THOROUGH_SECONDS
        self._size = -1  # of the log, as far as it was read
        self.trouble, self.looked = "", 0.0

    def look(self) -> None:
        """Read what is new. What cannot be read is a line of the page, but at the first look.

        Raises:
            OSError, LongseqError: at the first one.
        """
        try:
            if time.monotonic() - self._asked >= _THOROUGH_SECONDS or self._ends() != self.ends:
                self._look_thoroughly()
                self._asked = time.monotonic()
            else:
                self.curves.look()
                progress = starts.read_progress(self.run.starts_dir, self.start) or self.state.progress
                self.state = dataclasses.replace(self.state, progress=progress)
            self._read_messages()
            self.trouble, self.looked = "", time.time()
        except (OSError, LongseqError) as error:  # of a file system that is away for a moment
            if not self.looked:
                raise
            self.trouble = f"warning   {said(error)}; all this is as of {ago(self.looked)}"

    @property
    def over(self) -> bool:
        """Whether nothing trains the run any more, or waits to."""
        return ended(self.state) or self.state.word == "FINISHED"

    def page(self) -> list[str]:
        """What is known, a line each, the most important ones first."""
        lines = [
            *filter(None, [self.trouble]),
            *head(self.state),
            *self._time_left(),
            *self._losses(),
            *self._machines(),
        ]
        lines += [f"{self.kept}; the newest {ago(self.newest)}" if self.newest else self.kept, *self.history]
        if ended(self.state):
            lines.append(f"Go on with:    {self.run.resume_command}")
        if self.messages:
            lines += ["", *self.messages]
        return lines

    def _ends(self) -> list[bool]:
        """Whether the newest known start has ended, and the run."""
        places = starts.path_of(self.run.starts_dir, self.start, "end"), self.run.path / "FINISHED"
        return [path.exists() for path in places]

    def _look_thoroughly(self) -> None:
        self.start = max(starts.numbers(self.run.starts_dir), default=0)
        self.ends = self._ends()
        self.state = state_of(self.run, known([self.run])[0])
        self.config = self.run.config()
        self.kept, self.history = kept(self.run), history(self.run, _STARTS)
        checkpoints = self.run.checkpoints()
        self.newest = checkpoints[-1].path.stat().st_mtime if checkpoints else 0.0
        self.curves.look(self.run.tensorboard_dir)
        log = log_of(self.run, rank=0)
        if log != self.log:
            self.log, self._size = log, -1

    def _time_left(self) -> list[str]:
        at, rate = self.state.progress, self.curves.steps_per_second()
        if self.over or not at or not rate:
            return []
        seconds = (at.last_step - at.step) / rate
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds))
        return [f"left      {in_short(seconds)} at {rate:.3g} steps/s: until {end}, if nothing stops it"]

    def _losses(self) -> list[str]:
        points = {split: self.curves.newest(f"{split}/loss") for split in ("train", "valid")}
        words = [f"{split} {point.value:.4f} at step {point.step}" for split, point in points.items() if point]
        valid = self.curves.points.get("valid/loss", {}).values()
        if len(valid) > 1:
            best = min(valid, key=lambda point: point.value)
            words.append(f"best valid {best.value:.4f} at step {best.step}")
        return [f"loss      {', '.join(words)}"] if words else []

    def _machines(self) -> list[str]:
        trainer = self.config.trainer
        lines = [f"ranks     {self.config.processes}, on {trainer.nodes} node{'s' if trainer.nodes > 1 else ''}"]
        rank, ratio = (self.curves.newest(f"time/slowest_{name}") for name in ("rank", "ratio"))
        if rank and ratio:
            lines[0] += f"; the slowest is rank {rank.value:.0f}, {ratio.value:.2f} times the median's time"
        memory, share = self.curves.newest("machine/memory_gib"), self.curves.newest("machine/mfu")
        if memory:
            mfu = f"; {share.value:.1%} of the peak FLOP/s" if share else ""
            lines.append(f"memory    {memory.value:.2f} GiB, of the rank that uses most{mfu}")
        return lines

    def _read_messages(self) -> None:
        if self.log is None or self.log.stat().st_size == self._size:
            return
        with self.log.open("rb") as file:
            self._size = file.seek(0, 2)
            file.seek(max(0, self._size - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
        lines = text.split("\n")[1 if self._size > _TAIL else 0 :]  # the first one is cut
        shown = [line.rpartition("\r")[2].rstrip() for line in lines]
        self.messages = [line for line in shown if line and not _PROGRESS.match(line)][-_MESSAGES:]


def _draw(lines: list[str]) -> None:
    """Over the page before, as much as the terminal holds; what it lacks a letter for reads ?."""
    width, height = shutil.get_terminal_size()
    shown = [fitted(_printable(line), width) for line in lines][: height - 1]
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J")
    sys.stdout.flush()


@contextmanager
def _screen() -> Iterator[None]:
    """An empty terminal without a cursor; the last page stays."""
    sys.stdout.write("\x1b[?25l\x1b[H\x1b[2J")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()


def _printable(text: str) -> str:
    """Without what would do something to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text.replace("\t", "    "))


def fitted(text: str, width: int) -> str:
    """What of a line fits into so many columns."""
    columns = 0
    for place, letter in enumerate(text):
        wide = unicodedata.east_asian_width(letter) in "WF"
        columns += 0 if unicodedata.combining(letter) else 1 + wide
        if columns > width:
            return text[:place]
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 on")
    return value
