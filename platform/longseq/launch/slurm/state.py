"""How a run stands: from its folder, and from SLURM where it answers. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longseq.errors import RunError
from longseq.launch.slurm.queue import Queued, SlurmError, queue
from longseq.runs import starts
from longseq.runs.owner import newest_process
from longseq.runs.run import Run, as_typed
from longseq.runs.starts import Progress

_JOBS, _SHARED = "jobs.jsonl", "shared.jsonl"


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


def record_job(run: Run, job: str, command: str, script: Path | str = "") -> None:
    """Note in the run's folder that a job was submitted for it; ``script`` is what sbatch was given."""
    _note(run, _JOBS, {"job": job, "time": round(time.time()), "command": command, "script": str(script)})


def _note(run: Run, name: str, entry: dict[str, object]) -> None:
    run.slurm_dir.mkdir(exist_ok=True)
    with (run.slurm_dir / name).open("a+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in ("", "\n")  # a full disk's half line
        file.write("\n" * torn + json.dumps(entry) + "\n")


def jobs_of(run: Run) -> dict[str, str]:
    """The jobs that were submitted for a run, oldest first: id and script, which older versions did not note.

    Half a line, as a full disk leaves it, is passed over: `longseq submit` cancels a job that it cannot note.
    """
    return {str(entry["job"]): entry.get("script", "") for entry in _noted(run, _JOBS)}


def _noted(run: Run, name: str) -> Iterator[dict[str, Any]]:
    path = run.slurm_dir / name
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, LookupError):  # a line that is half written, or edited
            entry = json.loads(line)
            _ = entry["job"]
            yield entry


@dataclass(frozen=True)
class SharedJob:
    """A job that embeds, scores or benchmarks with a run, and trains nothing."""

    job: str
    verb: str
    place: str  # the folder of its shards
    command: str
    script: str
    time: int = 0

    @property
    def shards(self) -> int:
        """That are finished and wait for the others; none once all is done."""
        return sum(1 for _ in Path(self.place).glob("*.shard"))

    def live(self, queued: Mapping[str, Queued]) -> Queued | None:
        """What SLURM says of it, while it waits or runs."""
        job = self.known(queued)
        return job if job and job.alive else None

    def known(self, queued: Mapping[str, Queued]) -> Queued | None:
        job = queued.get(self.job)
        return job if job and _is_same(job.script, self.script) else None


def record_shared(run: Run, job: SharedJob) -> None:
    """Note a job in the folder of the run that it reads."""
    _note(run, _SHARED, asdict(job))


def shared_jobs(run: Run) -> list[SharedJob]:
    """Those that were submitted, oldest first."""
    names = {field.name for field in fields(SharedJob)}
    noted = ({key: value for key, value in entry.items() if key in names} for entry in _noted(run, _SHARED))
    return [SharedJob(**entry) for entry in noted]


def check_unshared(run: Run, place: Path) -> None:
    """Refuse a second job for one output.

    Raises:
        RunError: naming the first, and what to do.
    """
    same = [job for job in shared_jobs(run) if job.place == str(place)]
    queued = queue(job.job for job in same) if same else {}
    for job in same:
        live = job.live(queued)
        if live:
            here = as_typed(run.path)
            raise RunError(
                f"{place}: {live} writes there. Follow it (`longseq logs -f {here} --job {job.verb}`), wait for its "
                f"end, or cancel it first (`scancel {job.job}`: what is finished stays)."
            )


def runs_with_jobs(folder: Path) -> Iterator[Run]:
    """The runs of a folder that were submitted, the one with the newest job last."""
    found = sorted(folder.glob(f"*/slurm/{_JOBS}"), key=lambda path: (path.stat().st_mtime, path))
    return (Run(path.parent.parent.resolve()) for path in found)


def live_jobs(run: Run, queued: Mapping[str, Queued]) -> list[Queued]:
    """A run's jobs that run or wait, in the order of their submission."""
    known = ((queued.get(job), script) for job, script in jobs_of(run).items())
    return [job for job, script in known if job and job.alive and _is_same(job.script, script)]


def _is_same(script: str, noted: str) -> bool:
    """Whether a job is the one that was noted: a cluster that is set up anew counts its jobs from 1 again."""
    return not script or not noted or script == noted


def check_free(run: Run, *, take_over: bool = False, after: bool = False) -> None:
    """Refuse to start a run that something else trains, or may be training.

    take_over: also where what may be training cannot be asked.
    after: a job that waits for those that train the run.

    Raises:
        RunError: naming it, and what to do.
    """
    jobs, process = jobs_of(run), newest_process(run)
    ids = [*jobs, *([process.job] if process and process.job else [])]
    doubt = ""
    queued: dict[str, Queued] | None = None
    try:
        queued = queue(ids) if ids else {}
    except SlurmError as error:
        if jobs and not (run.path / "FINISHED").exists() and stopped(run) is None:
            doubt = f"SLURM cannot be asked whether job {next(reversed(jobs))} still has this run ({error})"
    live = live_jobs(run, queued or {})
    if live and not after:
        here, number = as_typed(run.path), live[0].job.partition("_")[0]
        raise RunError(
            f"{run.path}: {live[0]} has this run. Follow it (`longseq logs -f {here}`), wait for its end, or cancel it "
            f"first (`longseq cancel {here}`: it saves); `longseq submit {here} --dependency=afterany:{number}` goes "
            "on after it."
        )
    if process is not None:
        alive = process.alive()
        if alive is None and process.job and queued is not None:
            inside = queued.get(process.job)
            alive = None if inside and inside.alive else False  # it has ended with its job
        if alive:
            raise RunError(f"{run.path}: {process} trains this run. Wait for its end, or stop it first (it saves).")
        if alive is None:
            doubt = f"{process} has not said that it ended, and cannot be asked from here"
    if doubt and not take_over:
        raise RunError(f"{run.path}: {doubt}. If it trains no more, take it over: add --take-over.")


def stopped(run: Run) -> str | None:
    """Why a run was stopped for good, if it was."""
    try:
        return (run.path / "STOPPED").read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def state_of(run: Run, queued: Mapping[str, Queued] | None) -> State:
    """How a run stands; ``queued`` is None where SLURM cannot be asked."""
    numbers, jobs = starts.numbers(run.starts_dir), jobs_of(run)
    progress = next(filter(None, (starts.read_progress(run.starts_dir, n) for n in reversed(numbers))), None)
    live, process = live_jobs(run, queued or {}), newest_process(run)
    alive = process.alive() if process else False
    running = next((job for job in live if job.state == "RUNNING"), live[0] if live else None)
    reason = stopped(run)
    newest = next(reversed(jobs), "")
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
    elif process and alive is not False:
        word, why = ("RUNNING", str(process)) if alive else ("UNKNOWN", f"{process} cannot be asked from here")
    elif queued is None and jobs:
        word, why = "UNKNOWN", "SLURM does not answer"
    else:
        ended = (queued or {}).get(newest)
        if ended and not _is_same(ended.script, jobs[newest]):
            ended = None
        word, why = (ended.state if ended and ended.state != "COMPLETED" else "ENDED"), ""
        said = starts.read_end(run.starts_dir, numbers[-1]) if numbers else None
        verdict, _, reason = (said or "").partition(" ")
        why = reason if verdict in ("preflight", "error", "crashed", "lost") else verdict if verdict == "saved" else ""
        if not why and word != "ENDED":  # of SLURM's own, such as NonZeroExitCode: the script may not have come far
            why = ended.reason if ended and ended.reason != "None" else ""
    return State(run, newest, word, why, progress, len(numbers), "", "")
