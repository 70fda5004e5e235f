"""A real SLURM cluster for all tests here, and what a person does on its login node."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.slurm import Cluster, missing
from command_line import LONGSEQ, longseq
from longseq.launch.slurm import guard
from longseq.runs import starts
from longseq.runs.starts import Progress
from longseq_data.synth.synthetic import SyntheticSpec, write_fasta

TINY = """
model: {dim: 32, depth: 2, heads: 2, ffn_dim: 64}
attention: {features: 32, redraw_every: 7}
data: {train: proteins.fasta, length: 64, batch_tokens: 768}
optim: {lr: 0.003, warmup_steps: 5, schedule: constant}
trainer: {accelerator: cpu, max_steps: 20, valid_every: 10, checkpoint_every: 10, log_every: 1, probe_every: 0}
"""
SITE = """
environment: {OMP_NUM_THREADS: '1'}
signal_seconds: 60
pause_seconds: 2
preflight_disk_gib: 0.01
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Login:
    """A person on the login node, in a folder with tiny.yaml, site.yaml and a FASTA file."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.cluster_folder = cluster.folder

    def type(self, *words: object, check: bool = True) -> str:
        """A longseq command: what it prints on stdout."""
        return self.cluster.run(LONGSEQ, *words, check=check, cwd=self.folder)

    def begin(self, *words: object) -> subprocess.Popen[str]:
        """A longseq command that goes on beside the test."""
        return subprocess.Popen(
            self.cluster.command(LONGSEQ, *words),
            env=self.cluster.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, name: str, *words: object) -> tuple[str, Path]:
        """Submit tiny.yaml as a run: the (first) job's id and the run's folder."""
        said = self.type("submit", "tiny.yaml", f"run.name={name}", "--site=site.yaml", *words)
        job = said.split()[1].rstrip(",")
        assert said.startswith("job "), said
        return job, self.folder / "runs" / name

    def wait_for_step(self, run: Path, step: int, *, start: int = 1, timeout: float = 300) -> Progress:
        """Until a start from ``start`` on has made ``step`` steps."""
        deadline = time.monotonic() + timeout
        while True:
            for number in starts.numbers(run / "starts"):
                progress = starts.read_progress(run / "starts", number)
                if number >= start and progress and progress.step >= step:
                    return progress
            assert time.monotonic() < deadline, f"no step {step} of start {start}:\n{self.log(run)}"
            time.sleep(0.05)

    def log(self, run: Path) -> str:
        return "".join(log.read_text() for log in sorted((run / "slurm").glob("job-*.log")))

    def tasks(self, node: str) -> list[int]:
        """Ids of the training processes on a node, without the guards that they fork."""
        found = []
        for pid in self.cluster.processes(node):
            with suppress(OSError):
                task = b"longseq.launch.slurm.task" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:4]
                if task and Path(f"/proc/{pid}/comm").read_text().strip() != guard.NAME:
                    found.append(pid)
        return found

    def kill_task(self, node: str) -> None:
        os.kill(self.tasks(node)[0], signal.SIGKILL)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes, each of its own where namespaces may be made; SLURM_TEST_FLAT=1 does without."""
    if missing():
        pytest.skip(missing())
    with Cluster(3, flat="SLURM_TEST_FLAT" in os.environ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def login(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Login:
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "site.yaml").write_text(SITE)
    spec = SyntheticSpec(families=4, records=200, seed=0, mean_length=60)
    write_fasta(spec, folder / "proteins.fasta")
    return Login(cluster, folder)


@pytest.fixture(scope="session")
def here(login: Login) -> Callable[..., Path]:
    """here(name, *overrides): the same training on this machine, to its end; gives its folder."""

    def here(name: str, *overrides: str) -> Path:
        ended = longseq("fit", "tiny.yaml", f"run.name={name}", *overrides, folder=login.folder)
        assert ended.code == 0, ended.err
        return login.folder / "runs" / name

    return here
