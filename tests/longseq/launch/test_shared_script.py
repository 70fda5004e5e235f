"""The script of a job whose nodes share shards, with stand-ins for SLURM: when it goes on, comes back and ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from longseq.launch.slurm.render import Request, shared_script
from longseq.launch.slurm.site import Site

SHARD = 'touch "$place/$RANDOM$RANDOM.shard"'
BACK = "kill -USR1 $PPID; exec sleep 0.3"
SAYS = 'echo "{}" >"${{LONGSEQ_START%.start}}.end"'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("a run/slurm", "tools", "v.shards"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def job(place: Path, *starts: str, restart: int = 0, squeue: str = "echo RUNNING", **site: object) -> tuple[int, str]:
    """The exit code and what is said, where the starts of srun are shell commands, and then one succeeds."""
    for number, what in enumerate(starts):
        (place / "tools" / f"does-{number}").write_text(what)
    for name, body in {
        "srun": f"""place='{place}/v.shards'; next=$(ls '{place}'/tools/does-* 2>/dev/null | head -1)
echo "$LONGSEQ_START" >>'{place}/started'
if [ -z "$next" ]; then exit 0; fi
. "$next"; code=$?; rm "$next"; exit $code""",
        "squeue": squeue,
        "scontrol": f"echo \"$*\" >>'{place}/scontrol'",
    }.items():
        (place / "tools" / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / "tools" / name).chmod(0o755)
    request = Request(2, 1, gpus=False, by_node=True)
    words = ["embed", "a.fasta", "--out", "v"]
    site = {"pause_seconds": 0, **site}
    script = shared_script(place / "a run", "embed", words, place / "v.shards", Site(**site), request)  # type: ignore[arg-type]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(restart)}
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
    assert "restart 0, on n[1-2], behind 5 shards" in said
    assert not requeued(place)


def test_each_start_of_srun_has_a_number_of_its_own(place: Path) -> None:
    job(place, f"{SHARD}; (exit 137)")
    numbers = place / "a run/slurm/embed-7.fence"
    assert (place / "started").read_text() == f"{numbers}/00001.start\n{numbers}/00002.start\n"
    assert (numbers / "00002.start").read_text() == "slurm job 7, restart 0, on n[1-2], behind 1 shards\n"


def test_three_crashes_without_a_new_shard_end_it(place: Path) -> None:
    code, said = job(place, SHARD + "; (exit 9)", *["(exit 9)"] * 5)
    assert code == 70
    assert "three starts in a row have ended without a new shard" in said
    assert said.count("behind 1 shards") == 3


def test_preemptions_before_the_first_shard_are_no_crashes(place: Path) -> None:
    for restart in range(2):
        assert job(place, BACK, restart=restart)[0] == 75
    assert job(place, "(exit 9)", "(exit 9)", restart=2)[0] == 0
    assert job(place, *["(exit 9)"] * 3, restart=3)[0] == 70


def test_a_job_of_a_new_cluster_counts_anew(place: Path) -> None:
    assert job(place, SAYS.format("finished"), max_restarts=0)[0] == 0
    code, said = job(place, max_restarts=0)
    assert code == 0
    assert "start 00001 of embed" in said


def test_a_crash_while_slurm_is_away_waits_for_it(place: Path) -> None:
    (place / "tools/sleep").write_text(f"#!/bin/sh\necho $1 >>'{place}/slept'\n")
    (place / "tools/sleep").chmod(0o755)
    away = f"""if [ -e '{place}/v.shards/left-0' ]; then rm "$(ls -d '{place}'/v.shards/left-* | tail -1)"
echo 'slurm_load_jobs error: Unable to contact slurm controller'; exit 1; fi; echo RUNNING"""
    code, said = job(place, 'touch "$place/left-0" "$place/left-1"; (exit 1)', squeue=away, pause_seconds=40)
    assert code == 0
    assert said.count("SLURM does not answer") == said.count("SLURM answers again") == 1
    assert (place / "slept").read_text().split() == ["15", "15", "40"]


def test_what_a_person_must_fix_is_not_tried_again(place: Path) -> None:
    code, said = job(place, SAYS.format("error node 1: bad.fasta, line 3") + "; (exit 143)")
    assert code == 1
    assert "not tried again, a person must see to it: node 1: bad.fasta, line 3\n" in said
    assert "goes on" not in said
    assert job(place, restart=1)[0] == 0  # whoever has seen to it lets it come back


def test_a_job_whose_results_are_there_does_not_come_back(place: Path) -> None:
    code, said = job(place, SAYS.format("finished") + "; " + BACK)
    assert (code, requeued(place)) == (0, False)
    assert "finished" in said
    code, said = job(place, restart=1)  # by the loss of its node
    assert code == 0
    assert len((place / "started").read_text().splitlines()) == 1


def test_a_start_that_another_has_followed_leaves_the_job_alone(place: Path) -> None:
    code, said = job(place, 'touch "${LONGSEQ_START%/*}/00002.start"; (exit 77)')
    assert code == 77
    assert "start 00002 has this job now: start 00001 leaves it alone" in said


@pytest.mark.parametrize("requeue", [True, False])
def test_the_time_limit_sends_it_back_to_the_queue(place: Path, requeue: bool) -> None:
    code, said = job(place, f"{SHARD}; {BACK}", requeue=requeue)
    assert code == 75
    assert requeued(place) == requeue
    assert ("comes back" if requeue else "submit it again, and it goes on behind the shards") in said
    assert "restart 1, on n[1-2], behind 1 shards" in job(place, restart=1)[1]


def test_a_limit_too_short_for_any_shard_is_noticed(place: Path) -> None:
    codes = [job(place, BACK, restart=restart, max_restarts=3)[0] for restart in range(5)]
    assert codes == [75, 75, 75, 75, 70]


def test_a_job_that_was_cancelled_does_not_start_again(place: Path) -> None:
    code, said = job(place, "(exit 143)", squeue="echo CANCELLED")
    assert code == 75
    assert "SLURM ends this job (CANCELLED)" in said
    assert not requeued(place)
