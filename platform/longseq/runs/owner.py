"""Which process trains a run now, where no job of SLURM does. No torch here.

A local start says in its file in ``starts/`` what tells its process from a later one of the same number, and in its
``.end`` that it has ended. After a kill there is no ``.end``: a process of this machine is then looked for; one of
another machine cannot be asked, and may still be training.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from longseq.runs import starts
from longseq.runs.run import Run


@dataclass(frozen=True)
class Process:
    """A process that has begun a start."""

    host: str
    user: str
    pid: int
    boot: str  # of the machine: another one after it was switched off
    ticks: int  # when the process began, since then
    job: str | None  # of SLURM, inside of which it was started by hand

    @classmethod
    def this(cls) -> Process:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a number without a name, in a container
            user = str(os.getuid())
        pid = os.getpid()
        return cls(platform.node(), user, pid, _boot(), _ticks(pid), os.environ.get("SLURM_JOB_ID"))

    def alive(self) -> bool | None:
        """Whether it still runs; None where it cannot be asked."""
        if self.boot and self.boot == _boot():
            # 0: this process, or one of another namespace, whose number means nothing here: the run's lock tells.
            return self.pid != os.getpid() and self.ticks == _ticks(self.pid) != 0
        return False if self.host == platform.node() else None

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}"


def node_name() -> str:
    """This machine, as SLURM calls it where it is one of its nodes."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def words_of(process: Process) -> str:
    """What a local start writes into its file: a line for people, and one for :func:`newest_process`."""
    return f"{process.host} process {process.pid}\n{json.dumps(asdict(process))}"


def newest_process(run: Run) -> Process | None:
    """The process of a run's newest start; None for a job's, for one that has ended, and of an older version."""
    number = max(starts.numbers(run.starts_dir), default=0)
    if not number or starts.read_end(run.starts_dir, number) is not None:
        return None
    with suppress(ValueError, TypeError):
        return Process(**json.loads(starts.text_of(run.starts_dir, number, "start").partition("\n")[2]))
    return None


def _boot() -> str:
    with suppress(OSError):  # no Linux
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _ticks(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):  # no such process
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0
