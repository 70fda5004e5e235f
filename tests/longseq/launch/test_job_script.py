"""What a job script decides when its training has ended, with stand-ins for SLURM's commands in a real shell."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from longseq.config.schema import Config
from longseq.launch.slurm.render import Request, train_script
from longseq.launch.slurm.site import Site
from longseq.runs import starts


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    requeued: bool


class Job:
    """A script, a run's folder, and what its next starts are to do: shell commands, with $run and $start."""

    def __init__(self, folder: Path, **site: object):
        self.run, self.tools = folder / "a run", folder / "tools"
        self.run.mkdir()
        self.tools.mkdir()
        self.log = folder / "requeued"
        self.restart = 0
        config = Config()
        config.data.length, config.data.batch_tokens = 64, 128
        request = Request(2, 1, gpus=False, min_nodes=1, comes_back=bool(site.pop("comes_back", True)))
        self.script = train_script(self.run, config, Site(pause_seconds=0, **site), request)  # type: ignore[arg-type]
        self._tool("scontrol", f'echo "$*" >>"{self.log}"')
        self._tool("squeue", "echo ${STATE:-RUNNING}")

    def start(self, does: str, nodes: int = 2, log: Path | None = None, **environment: str) -> Ended:
        self._tool("srun", f'run="{self.run}"; starts="$run/starts"; start=$(ls "$starts" | grep start | tail -1)\n'
                           f'start=$starts/${{start%.start}}; echo "$*" >"{self.tools}/arguments"\n{does}')  # fmt: skip
        before = self.log.read_text() if self.log.exists() else ""
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(self.restart), "SLURM_JOB_NODELIST": "n[1-2]"}
        slurm["SLURM_JOB_NUM_NODES"] = str(nodes)
        slurm["SLURM_JOB_PARTITION"] = "main"
        script = self.script if log is None else f"exec >>'{log}' 2>&1\n{self.script}"
        done = subprocess.run(
            ["bash", "-c", script],
            env={**os.environ, "PATH": f"{self.tools}:/usr/bin:/bin", **slurm, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.restart += 1
        after = self.log.read_text() if self.log.exists() else ""
        return Ended(done.returncode, done.stdout + done.stderr, after != before)

    @property
    def arguments(self) -> str:
        return (self.tools / "arguments").read_text()

    def _tool(self, name: str, body: str) -> None:
        (self.tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.tools / name).chmod(0o755)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_what_is_finished_stays_finished(job):
    ended = job.start('echo finished >"$start.end"; touch "$run/FINISHED"')
    assert (ended.code, ended.requeued) == (0, False)
    ended = job.start("touch WAS_STARTED")
    assert (ended.code, ended.requeued) == (0, False)
    assert "finished already" in ended.said
    assert starts.numbers(job.run / "starts") == [1]


def test_what_was_saved_comes_back_as_the_same_run(job):
    for number in (1, 2, 3):
        ended = job.start('echo saved >"$start.end"; echo "5 20 2.5 100 0" >"$start.step"')
        assert (ended.code, ended.requeued) == (75, True)
        assert f"restart {number - 1}" in ended.said
        assert f"--start {number:05d} " in job.arguments
    assert not (job.run / "STOPPED").exists()


def test_a_refusal_stops_with_its_sentence(job):
    ended = job.start("""echo "error the disk; rm -rf ~ 'is' full" >"$start.end"; exit 1""")
    assert (ended.code, ended.requeued) == (1, False)
    assert "stopped for good: the disk; rm -rf ~ 'is' full" in ended.said
    again = job.start("touch WAS_STARTED")
    assert again.code == 70
    assert "the disk; rm -rf ~ 'is' full" in again.said


def test_an_unfit_node_is_named_and_the_job_ends(job):
    ended = job.start('echo "preflight node2: only 1 MiB free." >"$start.end"; exit 69')
    assert (ended.code, ended.requeued) == (69, False)
    assert "node2: only 1 MiB free." in ended.said
    assert not (job.run / "STOPPED").exists()  # the chain's next job may get other nodes


def test_a_crash_comes_back_and_a_second_one_after_the_same_step_does_not(job):
    at_step = 'echo "{} 20 2.5 100 0" >"$start.step"; exit 137'
    assert job.start(at_step.format(7)).requeued
    assert job.start(at_step.format(9)).requeued
    ended = job.start(at_step.format(9))
    assert (ended.code, ended.requeued) == (70, False)
    assert "crashed twice after step 9" in (job.run / "STOPPED").read_text()


@pytest.mark.parametrize("said", ["", "crashed rank 1 on n2: lost its peers."])
def test_a_crash_names_the_collectives_that_ranks_have_left(job, said):
    """NCCL has ended the processes: they say nothing, or what the others say who have lost one."""
    words = f'echo "{said}" >"$start.end"; ' if said else ""
    ended = job.start(f'{words}touch "$start.collectives-0" "$start.collectives-1"; exit 134')
    folder = job.run / "starts"
    command = f"`torchfrtrace --prefix 00001.collectives- {folder}`"
    why = said.partition(" ")[2].rstrip(".") or "srun's exit code is 134"
    sentence = f"{why}. What each rank's last collectives were: {command}."
    assert sentence in ended.said
    assert sentence in (folder / "00001.end").read_text()
    assert "torchfrtrace" not in job.start("exit 134").said  # the next start's have left none
    told = f'echo "lost n2: silent. See {command}" >"$start.end"; touch "$start.collectives-0"; exit 134'
    assert job.start(told.replace("`", "\\`")).said.count("torchfrtrace") == 1


def test_a_start_that_never_began_between_two_crashes_excuses_neither(job):
    crash = 'echo "9 20 2.5 100 0" >"$start.step"; exit 137'
    assert job.start(crash).requeued
    assert job.start("exit 1").requeued
    ended = job.start(crash)
    assert (ended.code, ended.requeued) == (70, False)
    assert "crashed twice after step 9" in ended.said


def test_a_save_between_two_crashes_after_the_same_step_makes_them_no_pair(job):
    crash = 'echo "9 20 2.5 100 0" >"$start.step"; exit 137'
    assert job.start(crash).requeued
    assert job.start('echo saved >"$start.end"').requeued
    assert job.start(crash).requeued


def test_starts_that_never_begin_are_tried_five_times(job):
    for _ in range(4):
        assert job.start("exit 1").requeued
    ended = job.start("exit 1")
    assert (ended.code, ended.requeued) == (70, False)
    assert "Five starts in a row" in ended.said


def test_a_job_comes_back_max_restarts_times(tmp_path):
    job = Job(tmp_path, max_restarts=2)
    save = 'echo saved >"$start.end"'
    assert [job.start(save).requeued for _ in range(3)] == [True, True, True]
    ended = job.start(save)
    assert (ended.code, ended.requeued) == (70, False)
    assert "has come back 2 times" in ended.said
    (job.run / "STOPPED").unlink()
    assert job.start(save, SLURM_JOB_ID="8").requeued  # another job begins to count


def test_a_return_with_a_new_checkpoint_does_not_count(tmp_path):
    """Time limits and preemption, for weeks; a crash that repeats itself without one ends it."""
    job = Job(tmp_path, max_restarts=1)
    checkpoints = job.run / "checkpoints"
    for step in range(1, 6):
        save = f'mkdir -p "{checkpoints}/step-{step:08d}.ckpt"; echo saved >"$start.end"'
        assert job.start(save).requeued
    assert job.start('echo "6 9 2.5 100 0" >"$start.step"; exit 137').requeued
    assert job.start('echo "7 9 2.5 100 0" >"$start.step"; exit 137').requeued
    ended = job.start("touch WAS_STARTED")
    assert ended.code == 70
    assert "has come back 1 times, the site profile's max_restarts, without a new checkpoint (step 5)" in ended.said


def test_processes_that_did_not_meet_are_tried_again(job):
    ended = job.start('echo "lost n2: no sign of rank 1 after 20 s." >"$start.end"; exit 69')
    assert (ended.code, ended.requeued) == (75, True)
    assert (job.run / "starts/00001.crash").read_text() == "never n2\n"
    assert not (job.run / "STOPPED").exists()


def sinfo(job: Job, *nodes: str) -> None:
    """A partition of these nodes, of which none is left out yet."""
    job._tool("sinfo", f"printf '%s\\n' {' '.join(nodes)}")
    (job.tools / "scontrol").write_text(f"""#!/bin/bash
case $1,$2 in
show,hostnames) tr , '\\n' <<<"$3" ;;
show,job) echo "JobId=7 ReqNodeList=(null) ExcNodeList=(null) NumNodes=2" ;;
*) echo "$*" >>"{job.log}" ;;
esac
""")


KILLED = """echo 'srun: error: n2: task 1: Killed' >&2
echo 'srun: launch/slurm: _step_signal: Terminating StepId=7.0' >&2
echo 'srun: error: n1: task 0: Killed' >&2
echo "{} 20 2.5 100 0" >"$start.step"; exit 137"""


def test_a_node_that_is_to_blame_twice_in_a_row_is_left_out(job, tmp_path):
    sinfo(job, "n1", "n2", "n3")
    log = tmp_path / "job.log"
    assert job.start(KILLED.format(0), log=log).requeued
    assert (job.run / "starts/00001.end").read_text() == "lost n2: task 1: Killed\n"
    assert "ExcNodeList" not in job.log.read_text()
    assert job.start(KILLED.format(0), log=log).requeued
    assert "update JobId=7 ExcNodeList=n2" in job.log.read_text()
    # On another node it is the training's own fault.
    assert job.start(KILLED.replace("n2", "n3").format(0), log=log).code == 70
    assert "has crashed 3 times after step 0" in (job.run / "STOPPED").read_text()
    assert "The last time: n3: task 1: Killed" in (job.run / "STOPPED").read_text()


def test_where_no_node_is_left_the_one_to_blame_is_named(job, tmp_path):
    sinfo(job, "n1", "n2")
    job.start(KILLED.format(4), log=tmp_path / "job.log")
    assert job.start(KILLED.format(4), log=tmp_path / "job.log").code == 70
    assert "ExcNodeList" not in job.log.read_text()
    stopped = (job.run / "STOPPED").read_text()
    assert "crashed twice after step 4" in stopped
    assert "Twice because of n2: have it looked at, and leave it out (exclude in the site's profile)." in stopped


def test_a_reason_that_names_all_nodes_blames_none(job):
    lost = 'echo "lost n1, n2: they met, but a collective did not end." >"$start.end"; exit 69'
    assert job.start(lost).requeued
    assert (job.run / "starts/00001.crash").read_text() == "never \n"


def test_tasks_get_the_environment_of_the_script(job):
    """`sbatch --export=NONE` has srun give its tasks nothing of it."""
    job.start("exit 1", SLURM_EXPORT_ENV="NONE")
    assert " --export=ALL " in job.arguments


def test_a_job_of_a_chain_leaves_the_rest_to_the_next(tmp_path):
    job = Job(tmp_path, comes_back=False)
    ended = job.start('echo saved >"$start.end"')
    assert (ended.code, ended.requeued) == (75, False)
    assert "the chain's next job" in ended.said


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "NODE_FAIL", "PREEMPTED"])
def test_a_job_that_slurm_is_ending_is_left_to_it(job, state):
    ended = job.start('echo "9 20 2.5 100 0" >"$start.step"; exit 143', STATE=state)
    assert (ended.code, ended.requeued) == (75, False)
    assert not list((job.run / "starts").glob("*.crash"))  # no fault of the training's


def test_a_job_that_is_cancelled_while_it_waits_to_come_back_does_not(tmp_path):
    job = Job(tmp_path)
    (job.tools / "squeue").write_text(f"""#!/bin/bash
if [ -e "{job.tools}/asked" ]; then echo CANCELLED; else touch "{job.tools}/asked"; echo RUNNING; fi
""")
    ended = job.start('echo saved >"$start.end"')
    assert (ended.code, ended.requeued) == (75, False)


def test_sigterm_with_time_to_save_is_a_signal_like_the_other(job):
    """As preemption with a time of grace sends it: a job that just ended would not come back."""
    waits = """trap 'echo saved >"$start.end"; exit 0' USR1; kill -TERM $PPID; for _ in {1..900}; do sleep 0.05; done"""
    ended = job.start(waits)
    assert (ended.code, ended.requeued) == (75, True)
    assert "TERM: the training is asked to save" in ended.said


def test_a_start_that_was_overtaken_touches_nothing(job):
    overtake = 'touch "$run/starts/00002.start"; exit 143'
    ended = job.start(overtake)
    assert (ended.code, ended.requeued) == (77, False)
    assert "start 00002 has this run now" in ended.said
    assert sorted(path.name for path in (job.run / "starts").iterdir()) == ["00001.start", "00002.start"]
    assert not (job.run / "STOPPED").exists()


def test_a_signal_reaches_the_training_and_what_it_says_then_counts(job):
    waits = """trap 'echo saved >"$start.end"; exit 0' USR1; kill -USR1 $PPID; for _ in {1..900}; do sleep 0.05; done"""
    ended = job.start(waits)
    assert (ended.code, ended.requeued) == (75, True)
    assert "USR1: the training is asked to save" in ended.said


def test_nodes_and_batches_are_those_of_the_nodes_that_came(job):
    job.start("exit 1", nodes=2)
    assert "--nodes=2 --ntasks=2 " in job.arguments
    assert "trainer.nodes=2 trainer.devices=1 trainer.accumulate=1" in job.arguments
    job.start("exit 1", nodes=1)
    assert "--nodes=1 --ntasks=1 " in job.arguments
    assert "trainer.nodes=1 trainer.devices=1 trainer.accumulate=2" in job.arguments
