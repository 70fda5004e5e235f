"""How a run stands: from its folder, and from SLURM where it answers. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from longseq import starts
from longseq.launch.slurm.queue import Queued
from longseq.run import Run
from longseq.starts import Progress

_JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class State:
    """One run."""

    run: Run
    job: str  # the one that counts: that runs or waits, else the newest; "" for a run without
    word: str  # FINISHED, STOPPED, a state of SLURM's, or ENDED
    why: str
    progress: Progress | None
    starts: int
    left: str
    nodes: str


def record_job(run: Run, job: str, command: str) -> None:
    """Note in the run's folder that a job was submitted for it."""
    run.slurm_dir.mkdir(exist_ok=True)
    with (run.slurm_dir / _JOBS).open("a") as file:
        file.write(json.dumps({"job": job, "time": round(time.time()), "command": command}) + "\n")


def jobs_of(run: Run) -> list[str]:
    """Ids of the jobs that were submitted for a run, oldest first."""
    try:
        lines = (run.slurm_dir / _JOBS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [str(json.loads(line)["job"]) for line in lines if line.strip()]


def runs_with_jobs(folder: Path) -> Iterator[Run]:
    """The runs of a folder that were submitted, the one with the newest job last."""
    found = sorted(folder.glob(f"*/slurm/{_JOBS}"), key=lambda path: (path.stat().st_mtime, path))
    return (Run(path.parent.parent.resolve()) for path in found)


def live_jobs(run: Run, queued: Mapping[str, Queued]) -> list[Queued]:
    """A run's jobs that run or wait, in the order of their submission."""
    known = (queued.get(job) for job in jobs_of(run))
    return [job for job in known if job and job.alive]


def stopped(run: Run) -> str | None:
    """Why a run was stopped for good, if it was."""
    try:
        return (run.path / "STOPPED").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def state_of(run: Run, queued: Mapping[str, Queued] | None) -> State:
    """How a run stands; ``queued`` is None where SLURM cannot be asked."""
    numbers, jobs = starts.numbers(run.starts_dir), jobs_of(run)
    progress = next(filter(None, (starts.read_progress(run.starts_dir, n) for n in reversed(numbers))), None)
    live = live_jobs(run, queued or {})
    running = next((job for job in live if job.state == "RUNNING"), live[0] if live else None)
    reason = stopped(run)
    newest = jobs[-1] if jobs else ""
    if running:
        waits = running.reason if running.state != "RUNNING" and running.reason != "None" else ""
        if running.state == "RUNNING" and numbers:
            waits = _read(starts.path_of(run.starts_dir, numbers[-1], "silent"))  # a rank that does not answer
        left = running.left if running.state == "RUNNING" else ""
        return State(run, running.job, running.state, waits, progress, len(numbers), left, running.nodes)
    if (run.path / "FINISHED").exists():
        word, why = "FINISHED", ""
    elif reason is not None:
        word, why = "STOPPED", reason
    elif queued is None and jobs:
        word, why = "UNKNOWN", "SLURM does not answer"
    else:
        ended = (queued or {}).get(newest)
        word, why = (ended.state if ended and ended.state != "COMPLETED" else "ENDED"), ""
        said = starts.read_end(run.starts_dir, numbers[-1]) if numbers else None
        verdict, _, reason = (said or "").partition(" ")
        why = reason if verdict in ("preflight", "error", "crashed", "lost") else verdict if verdict == "saved" else ""
        if not why and word != "ENDED":  # of SLURM's own, such as NonZeroExitCode: the script may not have come far
            why = ended.reason if ended and ended.reason != "None" else ""
    return State(run, newest, word, why, progress, len(numbers), "", "")
