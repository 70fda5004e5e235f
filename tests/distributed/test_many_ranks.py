"""What each rank does to a shared file system and to the network, counted in real processes, and the model of more.

    pytest -m long tests/distributed/test_many_ranks.py -n 0 -s

Two and four processes are counted; a count is ``fixed + ranks * each``, of connections ``ranks² * each``. What the
model says of 4,096 ranks stands in docs/how-to/slurm.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import LONGSEQ

pytestmark = [pytest.mark.distributed, pytest.mark.long]

STEPS, SAVES = 10, 2
KEYS = ("trainer.zero_stage=2", "trainer.valid_every=0", f"trainer.checkpoint_every={STEPS // SAVES}")
CALLS = "trace=%file,fsync,getdents64,connect"
PAGE = Path(__file__).parents[2] / "docs/how-to/slurm.md"


@dataclass(frozen=True)
class Law:
    """At most so many calls of all ranks together."""

    fixed: float
    each: float
    power: int = 1  # of the ranks

    def of(self, ranks: int) -> float:
        return self.fixed + self.each * ranks**self.power


# Upper bounds of what was counted, with room for another Python and other libraries.
LAWS = {
    "start": Law(90, 25),  # in the run's folder, once
    "checkpoint": Law(140, 30),  # in checkpoints/ and starts/, each time
    "curves": Law(45, 0),  # in tensorboard/ and starts/*.step, each point: rank 0's alone
    "code": Law(30_000, 80_000),  # of Python and libraries, once: where they lie on the shared file system
    "connections": Law(10, 1.2, power=2),  # of a start
}


def counted(line: str, run: str) -> str:
    """Which law a call falls under."""
    if line.startswith(("connect(", "<... connect")):
        return "connections" if "AF_INET" in line and "127.0.0.1" in line else ""
    if run not in line:
        return "code" if "/usr/" in line or "site-packages" in line or ".py" in line or "/lib" in line else ""
    if "/checkpoints" in line or re.search(r"/starts[\">]", line):
        return "checkpoint"
    return "curves" if "/tensorboard/" in line or ".step" in line else "start"


@pytest.fixture(scope="module")
def calls(folder: Path) -> Callable[[int], Counter[str]]:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    found: dict[int, Counter[str]] = {}

    def calls(ranks: int) -> Counter[str]:
        if ranks not in found:
            trace, run = folder / f"calls-{ranks}", f"counted-{ranks}"
            command = [
                strace,
                "-f",
                "--seccomp-bpf",
                "-qq",
                "-y",
                "-e",
                CALLS,
                "-o",
                trace,
                LONGSEQ,
                "fit",
                "tiny.yaml",
            ]
            keys = (f"run.name={run}", f"trainer.devices={ranks}", f"trainer.max_steps={STEPS}", *KEYS)
            ended = subprocess.run([*command, *keys], cwd=folder, capture_output=True, text=True, timeout=1200)
            assert ended.returncode == 0, ended.stderr
            lines = (line.split(maxsplit=1)[1] for line in trace.open(errors="replace"))
            found[ranks] = Counter(counted(line, f"/runs/{run}") for line in lines if not line.startswith("<... "))
        return found[ranks]

    return calls


@pytest.mark.parametrize("what", LAWS)
def test_ranks_do_no_more_than_the_model_says(calls, what, capsys):
    times = {"checkpoint": SAVES, "curves": STEPS}.get(what, 1)
    two, four = (calls(ranks)[what] / times for ranks in (2, 4))
    each = (four - two) / (4 ** LAWS[what].power - 2 ** LAWS[what].power)
    with capsys.disabled():
        print(
            f"\n{what}: {two:g} calls of 2 ranks, {four:g} of 4: {each:.1f} more each; "
            f"{LAWS[what].of(4096):,.0f} of 4,096 by the model"
        )
    assert two > 0
    assert two <= LAWS[what].of(2)
    assert four <= LAWS[what].of(4)
    assert each <= LAWS[what].each + 1


def test_the_page_says_what_the_model_does():
    page = PAGE.read_text()
    for what, law in LAWS.items():
        number = law.of(4096) / (4096 if law.power == 2 else 1)
        assert f"| {what} | {number:,.0f} |" in page, (what, number)
