"""What a run's job has written: rank 0 and the job script, or another rank; -f goes on until the run ends."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from longseq.commands.numbers import natural
from longseq.errors import RunError
from longseq.launch.local import rank_log
from longseq.launch.slurm.queue import SlurmError, queue
from longseq.launch.slurm.state import jobs_of, live_jobs, stopped
from longseq.run import Run

_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0  # between questions to SLURM, which has other things to do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    parser.add_argument("--rank", type=natural, default=0, metavar="R", help="the process whose log it is; default: 0")
    parser.add_argument("-n", "--lines", type=natural, metavar="N", help="the last N lines only")


def run(args: argparse.Namespace) -> int:
    run = Run.open(args.run_folder)
    path = _log(run, args.rank)
    if path is None and not args.follow:
        raise RunError(f"{run.path}: rank {args.rank} has no log: its job waits, or was never started.")
    shown, ended = 0, False
    if path is not None and args.lines is not None:
        shown = _tail_begins(path, args.lines)
    asked = 0.0
    while True:
        newer = _log(run, args.rank)
        if newer != path:  # the chain's next job
            _show(path, shown)  # its last words
            path, shown = newer, 0
        shown = _show(path, shown)
        if ended or not args.follow:
            return 0
        if time.monotonic() - asked > _ASK_SECONDS:
            ended, asked = _is_over(run), time.monotonic()
        ended = ended or (run.path / "FINISHED").exists() or stopped(run) is not None
        time.sleep(_POLL_SECONDS)


def _log(run: Run, rank: int) -> Path | None:
    if rank:
        return rank_log(run, rank) if rank_log(run, rank).exists() else None
    logs = sorted(run.slurm_dir.glob("job-*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def _show(path: Path | None, begin: int) -> int:
    """Print a file from a byte on; gives where it ended."""
    if path is None:
        return 0
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(begin)
        while block := file.read(1 << 16):
            sys.stdout.write(block.decode(errors="replace"))
            begin += len(block)
        sys.stdout.flush()
    return begin


def _tail_begins(path: Path, lines: int) -> int:
    """Where the last lines of a file begin."""
    with path.open("rb") as file:
        position, found = file.seek(0, os.SEEK_END), -1  # the last line's own end is none between two
        while position > 0 and found < lines:
            step = min(1 << 16, position)
            position -= step
            file.seek(position)
            block = file.read(step)
            for index in range(len(block) - 1, -1, -1):
                if block[index] == 10:
                    found += 1
                    if found == lines:
                        return position + index + 1
    return 0


def _is_over(run: Run) -> bool:
    """Whether no job of this run runs or waits; not where SLURM does not answer."""
    try:
        return bool(jobs_of(run)) and not live_jobs(run, queue(jobs_of(run)))
    except SlurmError:
        return False
