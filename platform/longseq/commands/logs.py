"""What a run has written, on this machine or as a job (rank 0 and the job script), or another rank; -f follows it."""

from __future__ import annotations

import argparse
import codecs
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from longseq.commands.numbers import natural
from longseq.errors import RunError
from longseq.launch.shared_work import SHARED
from longseq.launch.slurm.queue import SlurmError, queue
from longseq.launch.slurm.state import jobs_of, live_jobs, shared_jobs, stopped
from longseq.runs.run import Run

_POLL_SECONDS = 0.5
_BLOCK = 1 << 16
_ASK_SECONDS = 5.0  # between questions to SLURM, which has other things to do
_ASK_AT_THE_END_SECONDS = 1.0
_LAST_WORDS_SECONDS = 30.0  # for a job's script, after the training has ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    parser.add_argument("--rank", type=natural, default=0, metavar="R", help="the process whose log it is; default: 0")
    parser.add_argument(
        "--job", choices=("train", "evaluate", *SHARED), default="train", help="the newest job of a kind"
    )
    parser.add_argument("-n", "--lines", type=natural, metavar="N", help="the last N lines only")


def run(args: argparse.Namespace) -> int:
    run = Run.open(args.run_folder)
    path = log_of(run, args.rank, args.job)
    if path is None and not args.follow:
        if args.job != "train":
            raise RunError(f"{run.path}: no job has written a log yet that {args.job}s with this run.")
        raise RunError(f"{run.path}: rank {args.rank} has no log: {_why(run, args.rank)}.")
    shown, ended = 0, False
    if path is not None and args.lines is not None:
        shown = _tail_begins(path, args.lines)
    asked, over = 0.0, math.inf  # since when the run's folder says that no training follows
    while True:
        newer = log_of(run, args.rank, args.job)
        if newer != path:  # the chain's next job
            _show(path, shown, final=True)  # its last words
            path, shown = newer, 0
        shown = _show(path, shown, final=ended or not args.follow)
        if ended or not args.follow:
            return 0
        now = time.monotonic()
        if args.job == "train" and over == math.inf and ((run.path / "FINISHED").exists() or stopped(run) is not None):
            over, asked = now, 0.0
        if now - asked > (_ASK_SECONDS if over == math.inf else _ASK_AT_THE_END_SECONDS):
            ended, asked = _is_over(run, args.job, trained=over < math.inf), now
        ended = ended or now - over > _LAST_WORDS_SECONDS
        time.sleep(_POLL_SECONDS)


def log_of(run: Run, rank: int, job: str = "train") -> Path | None:
    """The newest log of a process, if there is one; or of a job that trains nothing."""
    if job != "train":
        noted = [run.slurm_dir / f"{job}-{each.job}.log" for each in shared_jobs(run) if each.verb == job]
        there = [path for path in noted if path.exists()]  # of two that run the newer one, whichever wrote last
        return there[-1] if there else None
    own = [run.rank_log(rank)] if run.rank_log(rank).exists() else []  # of a run on this machine, or a rank from 1 on
    jobs = [] if rank else run.slurm_dir.glob("job-*.log")
    logs = sorted([*own, *jobs], key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def _why(run: Run, rank: int) -> str:
    ranks = sorted(int(path.stem[5:]) for path in run.logs_dir.glob("rank-*.log"))
    if ranks:
        return f"those of ranks {', '.join(map(str, ranks))} are there" if rank else "it has written nothing yet"
    return "its job waits, or was never started" if jobs_of(run) else "this run has not been started"


def _show(path: Path | None, begin: int, *, final: bool) -> int:
    """Print a file from a byte on; gives where it ended. ``final``: also what is no whole character at its end."""
    if path is None:
        return 0
    # A character may lie on both sides of a block's end, or be half written: it is left for the next look.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with suppress(FileNotFoundError), path.open("rb") as file:  # nothing was said yet
        file.seek(begin)
        while block := file.read(_BLOCK):
            sys.stdout.write(decoder.decode(block))
            begin += len(block)
        begin -= len(decoder.getstate()[0])
        if final:
            sys.stdout.write(decoder.decode(b"", final=True))
        sys.stdout.flush()
    return begin


def _tail_begins(path: Path, lines: int) -> int:
    """Where the last lines of a file begin."""
    with path.open("rb") as file:
        position, found = file.seek(0, os.SEEK_END), -1  # the last line's own end is none between two
        while position > 0 and found < lines:
            step = min(_BLOCK, position)
            position -= step
            file.seek(position)
            block = file.read(step)
            for index in range(len(block) - 1, -1, -1):
                if block[index] == 10:
                    found += 1
                    if found == lines:
                        return position + index + 1
    return 0


def _is_over(run: Run, job: str, *, trained: bool) -> bool:
    """Whether no job of this run and kind runs or waits, and no training here; not where SLURM does not answer.

    trained: to its end. The script of a job that still runs says a last word; a chain's jobs that wait do not count.
    """
    if job != "train":
        known = [each for each in shared_jobs(run) if each.verb == job]
        with suppress(SlurmError):
            queued = queue(each.job for each in known) if known else {}
            return not any(each.live(queued) for each in known)
        return False
    try:
        live = live_jobs(run, queue(jobs_of(run))) if jobs_of(run) else []
    except SlurmError:
        return trained
    if trained:
        return not any(job.state in ("RUNNING", "COMPLETING") for job in live)
    return not live and not run.is_trained_here()
