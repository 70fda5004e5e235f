"""The script of a job whose nodes share shards, with stand-ins for SLURM: when it goes on, comes back and ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from longseq.launch.slurm.render import Request, shared_script
from longseq.launch.slurm.site import Site

SHARD = 'touch "$place/$RANDOM$RANDOM.shard"'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("a run/slurm", "tools", "v.shards"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def job(place: Path, *starts: str, restart: int = 0, state: str = "RUNNING", **site: object) -> tuple[int, str]:
    """The exit code and what is said, where the starts of srun are shell commands, and then one succeeds."""
    for number, what in enumerate(starts):
        (place / "tools" / f"does-{number}").write_text(what)
    for name, body in {
        "srun": f"""place='{place}/v.shards'; next=$(ls '{place}'/tools/does-* 2>/dev/null | head -1)
if [ -z "$next" ]; then exit 0; fi
. "$next"; code=$?; rm "$next"; exit $code""",
        "squeue": f"echo {state}",
        "scontrol": f"echo \"$*\" >>'{place}/scontrol'",
    }.items():
        (place / "tools" / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / "tools" / name).chmod(0o755)
    request = Request(2, 1, gpus=False, by_node=True)
    words = ["embed", "a.fasta", "--out", "v"]
    script = shared_script(place / "a run", "embed", words, place / "v.shards", Site(**site), request)  # type: ignore[arg-type]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": str(restart)}
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{place}/tools:/usr/bin:/bin", **slurm},
        capture_output=True,
        text=True,
        timeout=60,
    )
    for left in (place / "tools").glob("does-*"):
        left.unlink()
    return done.returncode, done.stdout + done.stderr


def requeued(place: Path) -> bool:
    return (place / "scontrol").exists() and "requeue 7" in (place / "scontrol").read_text()


def test_what_crashes_goes_on_in_the_job_as_long_as_shards_are_finished(place: Path) -> None:
    code, said = job(place, *[f"{SHARD}; (exit 137)"] * 5)
    assert code == 0
    assert said.count("srun's exit code is 137: goes on in this job") == 5
    assert "restart 0, behind 5 shards" in said
    assert not requeued(place)
    assert not list((place / "a run/slurm").iterdir())


def test_three_crashes_without_a_new_shard_end_it(place: Path) -> None:
    code, said = job(place, SHARD + "; (exit 9)", *["(exit 9)"] * 5)
    assert code == 70
    assert "three starts in a row have ended without a new shard" in said
    assert said.count("behind 1 shards") == 3


def test_what_a_person_must_fix_is_not_tried_again(place: Path) -> None:
    code, said = job(place, f"touch '{place}/a run/slurm/embed-7.failed'; (exit 143)")
    assert code == 1
    assert "goes on" not in said
    assert job(place)[0] == 0  # the job that is submitted again, or comes back


@pytest.mark.parametrize("requeue", [True, False])
def test_the_time_limit_sends_it_back_to_the_queue(place: Path, requeue: bool) -> None:
    code, said = job(place, f"{SHARD}; kill -USR1 $PPID; exec sleep 0.3", requeue=requeue)
    assert code == 75
    assert requeued(place) == requeue
    assert ("comes back" if requeue else "submit it again, and it goes on behind the shards") in said
    assert "restart 1, behind 1 shards" in job(place, restart=1)[1]


def test_a_limit_too_short_for_any_shard_is_noticed(place: Path) -> None:
    back = "kill -USR1 $PPID; exec sleep 0.3"
    codes = [job(place, back, restart=restart, max_restarts=3)[0] for restart in range(5)]
    assert codes == [75, 75, 75, 75, 70]


def test_a_job_that_was_cancelled_does_not_start_again(place: Path) -> None:
    code, said = job(place, "(exit 143)", state="CANCELLED")
    assert code == 75
    assert "SLURM ends this job (CANCELLED)" in said
    assert not requeued(place)
