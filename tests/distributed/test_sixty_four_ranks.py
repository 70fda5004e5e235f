"""Sixty-four real processes of one training: what their start costs each, and what they ask of a shared file system.

    pytest -m long tests/distributed/test_sixty_four_ranks.py -n 0 -s

They begin with the libraries imported (tests/warm.py), which keeps them within 16 GiB of memory together; what the
imports cost a process, whatever the number of ranks, is added.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import warm
from command_line import Command
from longseq.runs import starts

pytestmark = [pytest.mark.distributed, pytest.mark.long]

RANKS = int(os.environ.get("LONGSEQ_RANKS", "64"))
WATCHED_SECONDS = 60.0
KEYS = ("trainer.zero_stage=2", "trainer.valid_every=0", "trainer.max_steps=1000000", "trainer.log_every=100000")
IMPORTS = f"import os\nfor name in {warm.IMPORTED}: __import__(name)\nprint(sum(os.times()[:2]))"


@dataclass(frozen=True)
class Training:
    """One that has made its first step."""

    run: Path
    ranks: list[int]  # process ids
    cpu: list[float]  # seconds of each until then


@contextmanager
def training(folder: Path, ranks: int) -> Iterator[Training]:
    name = f"ranks-{ranks}"
    keys = (f"run.name={name}", f"trainer.devices={ranks}", f"data.batch_tokens={64 * ranks}", *KEYS)
    command = Command("fit", "tiny.yaml", *keys, folder=folder, timeout=1800, start=warm.Process)
    run, own = folder / "runs" / name, command.process.pid
    try:
        while starts.read_progress(run / "starts", 1) is None:
            assert command.process.poll() is None, command.err.read_text()
            assert time.monotonic() < command.deadline, command.err.read_text()
            time.sleep(0.05)
        # Warm processes are their seed's children, as the command is itself.
        seed = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{own}/status").read_text(), re.M)
        assert seed is not None
        children = map(int, Path(f"/proc/{seed[1]}/task/{seed[1]}/children").read_text().split())
        found = [pid for pid in children if pid != own and "longseq-guard" not in comm(pid)]
        yield Training(run, found, [cpu(pid) for pid in found])
    finally:
        command.process.send_signal(signal.SIGKILL)  # its training processes end with it
        command.process.wait()


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def cpu(pid: int) -> float:
    """Seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_start_costs_each_of_64_processes_what_it_costs_each_of_two(folder: Path, capsys) -> None:
    if warm.seed() is None:
        pytest.skip("64 processes with imports of their own take 30 GiB")
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    imports = float(done.stdout)
    with training(folder, 2) as two:
        assert len(two.ranks) == 2
    with training(folder, RANKS) as many:
        assert len(many.ranks) == RANKS
        calls = counted(many, folder)
    few, each = statistics.mean(two.cpu), statistics.mean(many.cpu)
    ratio = (imports + each) / (imports + few)
    minute = calls / RANKS * 60 / WATCHED_SECONDS
    with capsys.disabled():
        print(
            f"\nuntil the first step: {few:.2f} s of CPU each of 2 processes, {each:.2f} s of {RANKS} (at most "
            f"{max(many.cpu):.2f}), and {imports:.2f} s for imports: {ratio:.2f} times; "
            f"while training {minute:.3f} calls on the run's folder per rank and minute"
        )
    assert ratio <= 1.5
    assert 0 < minute <= 1


def counted(many: Training, folder: Path) -> int:
    """Calls of all ranks that name something in the run's folder, or read or sync it, while they train."""
    strace = shutil.which("strace")
    assert strace, "strace is not installed"
    trace = folder / "calls"
    before = starts.read_progress(many.run / "starts", 1)
    attached = [word for pid in many.ranks for word in ("-p", str(pid))]
    command = [strace, "-f", "-qq", "-y", "-e", "trace=%file,fsync,getdents64", "-o", trace, *attached]
    with subprocess.Popen(command) as watching:
        time.sleep(WATCHED_SECONDS)
        watching.send_signal(signal.SIGINT)
    assert before is not None
    return sum(many.run.name in line for line in trace.open(errors="replace"))
