"""What SLURM says, by its own commands: submission, the queue, cancelling. Accounting (sacct) is not needed."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longseq.errors import LongseqError

# Id, state, reason, time left, nodes, start, user, own id, script.
_FIELDS = ("%i", "%T", "%r", "%L", "%N", "%S", "%u", "%A", "%o")
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_CONFIRM_SECONDS = 10.0
_AT_ONCE = 1000  # ids in one command line


class SlurmError(LongseqError):
    """A command of SLURM that failed, or is not there."""


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it; it also shows those that ended a short while ago."""

    job: str  # "12", or "12_3" of an array
    state: str
    reason: str
    left: str  # D-HH:MM:SS of its time limit
    nodes: str
    start: str
    user: str = ""
    own_id: str = ""  # of a member of an array: what it finds in SLURM_JOB_ID
    script: str = ""

    @property
    def alive(self) -> bool:
        """Whether it waits, runs, or is about to."""
        return self.state not in ENDED

    def __str__(self) -> str:
        what = f"job {self.job} ({self.state})"
        what += f" of {self.user}" if self.user else ""
        return what + (f" on {self.nodes}, since {self.start}" if self.nodes else "")


def queue(jobs: Iterable[str]) -> dict[str, Queued]:
    """What SLURM says of jobs, by id: of all users' jobs, since a run may be another user's.

    jobs: ids as :class:`Queued` has them; of a member of an array all members are given. Those that SLURM does not
        know any more are left out.

    Raises:
        SlurmError: where there is no SLURM, or it does not answer.
    """
    ids = sorted({job.partition("_")[0] for job in jobs}, key=int)
    found: dict[str, Queued] = {}
    for first in range(0, len(ids), _AT_ONCE):
        some = ",".join(ids[first : first + _AT_ONCE])
        try:
            text = _call(
                *("squeue", "--noheader", "--array", "--states=all"),
                *(f"--jobs={some}", f"--format={'|'.join(_FIELDS)}"),
            )
        except SlurmError as error:
            if "Invalid job id" not in str(error):
                raise
            continue  # one that it does not know any more
        for line in text.splitlines():
            if line.count("|") >= 5:
                job = Queued(*map(str.strip, line.split("|")))
                found[job.job] = job
                found.setdefault(job.own_id, job)
    return found


def submit(script: Path, *options: str) -> str:
    """Hand a script to sbatch, and see with squeue that it is there: the id of the job.

    Raises:
        SlurmError: with sbatch's own words.
    """
    said = _call("sbatch", "--parsable", *options, str(script))
    job = said.strip().splitlines()[-1].partition(";")[0] if said.strip() else ""
    if not job.isdecimal():
        raise SlurmError(f"sbatch answered {said.strip()!r}, which is no job's number.")
    # slurmctld may die between its answer and its disk: what counts is that the job is there.
    deadline = time.monotonic() + _CONFIRM_SECONDS
    while not any(known.partition("_")[0] == job for known in queue([job])):
        if time.monotonic() > deadline:
            raise SlurmError(f"sbatch gave job {job}, but squeue does not know it: submit it again.")
        time.sleep(0.3)
    return job


def test_only(script: str) -> str:
    """What sbatch says of a script that is not submitted: when and where it would start.

    Raises:
        SlurmError: with sbatch's own words, where it would be refused.
    """
    return _call("sbatch", "--test-only", input=script, errors=True).strip()


def cancel(jobs: Sequence[str]) -> None:
    """End jobs: SIGTERM, on which a training saves, and later SIGKILL.

    Raises:
        SlurmError: with scancel's own words.
    """
    _call("scancel", *jobs)


def _call(command: str, *arguments: str, input: str | None = None, errors: bool = False) -> str:
    # A job that submits another must not hand on what it was given itself.
    kept = {name: value for name, value in os.environ.items() if not re.match(r"SLURM_(?!CONF$)", name)}
    try:
        done = subprocess.run([command, *arguments], input=input, capture_output=True, text=True, timeout=60, env=kept)
    except FileNotFoundError:
        raise SlurmError(f"{command}: not found: this is no machine of a SLURM cluster.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command}: no answer from SLURM within a minute.") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError(f"{'; '.join(lines) or f'{command}: failed with exit code {done.returncode}'}.")
    return done.stdout + (done.stderr if errors else "")
