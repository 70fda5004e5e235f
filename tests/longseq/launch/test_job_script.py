"""What a job script decides when its training has ended, with stand-ins for SLURM's commands in a real shell."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
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


SAVE = 'echo saved >"$start.end"'


class Job:
    """A script, a run's folder, and what its next starts are to do: shell commands, with $run and $start.

    A job goes on by itself: its script is run until it ends, and a start that nothing was said of saves.
    """

    def __init__(self, folder: Path, *, nodes: int = 2, min_nodes: int | None = None, spares: int = 0, **site: object):
        self.run, self.tools = folder / "a run", folder / "tools"
        self.run.mkdir()
        self.tools.mkdir()
        self.log, self.output = folder / "requeued", folder / "job.log"
        self.dead, self.unready = folder / "dead", folder / "unready"  # nodes; these as often as written
        self.restart, self.nodes = 0, nodes + spares
        config = Config()
        config.data.length, config.data.batch_tokens = 64, 64 * nodes
        comes_back = bool(site.pop("comes_back", True))
        request = Request(nodes, 1, gpus=False, min_nodes=min_nodes, spares=spares, comes_back=comes_back)
        self.script = train_script(self.run, config, Site(pause_seconds=0, **site), request)  # type: ignore[arg-type]
        self._tool("squeue", 'case "$*" in *%T*) echo ${STATE:-RUNNING} ;; esac')
        self._tool("sleep", 'if [ "${1%.*}" -ge 10 ]; then echo "slept $1"; fi; exec /bin/sleep 0.05')
        self.partition()

    def partition(self, *names: str) -> None:
        """What it is made of; no node is left out yet."""
        self._tool(
            "sinfo",
            f"case \"$*\" in *%o*) echo address-of-${{3#--nodes=}} ;; *) printf '%s\\n' {' '.join(names)} ;; esac",
        )
        self._tool(
            "scontrol",
            f'''case $1,$2 in
show,hostnames) if [[ $3 = *[* ]]; then seq -f n%g {self.nodes}; else tr , "\\n" <<<"$3"; fi ;;
show,reservation) grep "^ReservationName=${{3//--oneliner/[^ ]*}} " "{self.tools}/reservations" 2>/dev/null ;;
show,job) echo "JobId=7 ReqNodeList=(null) ExcNodeList=(null) NumNodes=2" ;;
*) echo "$*" >>"{self.log}" ;;
esac''',
        )

    def start(self, *does: str, **environment: str) -> Ended:
        """Run the script; what it has said so far is in job.log, where it reads it."""
        for number, what in enumerate(does):
            (self.tools / f"does-{number}").write_text(what)
        self._tool(
            "srun",
            f'''run="{self.run}"; starts="$run/starts"; start=$(ls "$starts" | grep start | tail -1)
start=$starts/${{start%.start}}
case " $* " in
*" longseq.launch.slurm.task "*)
    echo "$*" >>"{self.tools}/arguments"
    next=$(ls "{self.tools}"/does-* 2>/dev/null | head -1)
    if [ -n "$next" ]; then mv "$next" "{self.tools}/now"; else echo '{SAVE}' >"{self.tools}/now"; fi
    . "{self.tools}/now" ;;
*" bash "*) exec /bin/sleep 20 ;; # that watches over the node of the script
*) list=" $(tr , " " <<<"${{*#*--nodelist=}}") "
    for node in $(cat "{self.dead}" 2>/dev/null); do [[ $list != *" $node "* ]] || exit 1; done
    exec 9>>"{self.tools}/lock"; flock 9
    for node in $(sort -u "{self.unready}" 2>/dev/null); do
        [[ $list == *" $node "* ]] || continue
        sed -i "0,/^$node$/{{//d}}" "{self.unready}"
        echo "srun: error: Unable to create step for job 7: Memory required by task is not available" >&2; exit 1
    done ;;
esac''',
        )
        before = self.log.read_text() if self.log.exists() else ""
        said = len(self.said)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(self.restart), "SLURM_JOB_PARTITION": "main"}
        slurm |= {"SLURM_JOB_NODELIST": f"n[1-{self.nodes}]", "SLURM_JOB_NUM_NODES": str(self.nodes)}
        with self.output.open("ab") as output:
            done = subprocess.run(
                ["bash", "-c", self.script],
                env={**os.environ, "PATH": f"{self.tools}:/usr/bin:/bin", **slurm, **environment},
                stdout=output,
                stderr=output,
                timeout=120,
            )
        for left in self.tools.glob("does-*"):
            left.unlink()
        self.restart += 1
        after = self.log.read_text() if self.log.exists() else ""
        return Ended(done.returncode, self.said[said:], "requeue 7" in after[len(before) :])

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def arguments(self) -> list[str]:
        """Of each start."""
        return (self.tools / "arguments").read_text().splitlines()

    @property
    def starts(self) -> list[int]:
        return starts.numbers(self.run / "starts")

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
    assert job.starts == [1]


def test_what_was_saved_comes_back_as_the_same_run(job):
    for number in (1, 2, 3):
        ended = job.start(SAVE)
        assert (ended.code, ended.requeued) == (75, True)
        assert f"restart {number - 1}" in ended.said
        assert f"--start {number:05d} " in job.arguments[-1]
    assert job.starts == [1, 2, 3]  # what was saved was asked to leave
    assert not (job.run / "STOPPED").exists()


def test_a_refusal_stops_with_its_sentence(job):
    ended = job.start("""echo "error the disk; rm -rf ~ 'is' full" >"$start.end"; exit 1""")
    assert (ended.code, ended.requeued) == (1, False)
    assert "stopped for good: the disk; rm -rf ~ 'is' full" in ended.said
    again = job.start("touch WAS_STARTED")
    assert again.code == 70
    assert "the disk; rm -rf ~ 'is' full" in again.said


AT_STEP = 'echo "{} 20 2.5 100 0" >"$start.step"; exit 137'
UNFIT = 'echo "preflight n2: only 1 MiB free." >"$start.end"; exit 69'
KILLED = """echo 'srun: error: n2: task 1: Killed' >&2
echo 'srun: launch/slurm: _step_signal: Terminating StepId=7.0' >&2
echo 'srun: error: n1: task 0: Killed' >&2
echo "{} 20 2.5 100 0" >"$start.step"; exit 137"""


def test_a_crash_is_followed_by_a_start_in_the_same_job(job):
    ended = job.start(AT_STEP.format(7))
    assert (ended.code, ended.requeued) == (75, True)  # by the second start, which saved
    assert job.starts == [1, 2]
    assert "goes on in this job, without the queue" in ended.said
    assert [Path(job.run / f"starts/0000{n}.start").read_text().split(" on ")[0] for n in (1, 2)] == [
        "slurm job 7, restart 0,"
    ] * 2
    assert ["--overlap" in arguments for arguments in job.arguments] == [False, True]
    assert not any("--nodelist" in arguments for arguments in job.arguments)


REFUSED = "echo 'srun: error: Unable to create step for job 7: Requested nodes are busy' >&2; exit 1"


def test_a_start_inside_the_job_asks_again_where_slurm_makes_no_step_yet(job):
    """For some seconds after a start of its controller, which srun itself would ask again after two minutes."""
    ended = job.start(AT_STEP.format(3), REFUSED, REFUSED)
    assert (ended.code, ended.requeued, job.starts) == (75, True, [1, 2])
    assert starts.read_end(job.run / "starts", 2) == "saved"
    assert ["--overlap --immediate=10 " in arguments for arguments in job.arguments] == [False, True, True, True]
    assert [arguments.split(" --start ")[1][:5] for arguments in job.arguments] == ["00001", *["00002"] * 3]


def test_a_start_inside_the_job_that_slurm_does_not_begin_in_a_minute_is_left_to_the_queue(job):
    clock = f'echo >>"{job.tools}/minutes"; echo $((1800000000 + 25 * $(wc -l <"{job.tools}/minutes")))'
    job._tool("date", f'if [ "$1" = +%s ]; then {clock}; else exec /bin/date "$@"; fi')
    ended = job.start(AT_STEP.format(3), REFUSED, REFUSED, REFUSED, "exit 99")
    assert (ended.code, ended.requeued, job.starts) == (75, True, [1, 2])
    why = "Unable to create step for job 7: Requested nodes are busy"
    assert f"start 00002 has not begun, since SLURM starts nothing here ({why})" in ended.said
    assert starts.read_end(job.run / "starts", 2) == f"lost SLURM starts nothing in this job: {why}"
    assert len(job.arguments) == 4
    assert not (job.run / "starts/00002.crash").exists()  # no fault of the training's


def test_a_node_on_which_no_step_can_be_made_yet_is_not_left_out(tmp_path):
    job = Job(tmp_path, spares=1)
    job.unready.write_text("n1\nn2\nn2\n")  # for one question and two
    ended = job.start(AT_STEP.format(3))
    assert (ended.code, job.starts) == (75, [1, 2])
    assert job.unready.read_text() == ""
    assert not any("--nodelist" in arguments for arguments in job.arguments)


def test_an_unfit_node_is_named_and_the_job_ends(job):
    ended = job.start(UNFIT)
    assert (ended.code, ended.requeued) == (69, False)
    assert "n2: only 1 MiB free." in ended.said
    assert not (job.run / "STOPPED").exists()  # the chain's next job may get other nodes


def test_an_unfit_node_is_left_out_by_the_queue_where_the_job_has_no_other(job):
    job.partition("n1", "n2", "n3")
    ended = job.start(UNFIT)
    assert (ended.code, ended.requeued) == (75, True)
    assert job.log.read_text().splitlines() == ["requeue 7", "update JobId=7 ExcNodeList=n2"]
    assert "without n2 from now on" in ended.said
    assert job.starts == [1]


@pytest.mark.parametrize(
    ("inside", "nodes", "requeued"),
    [("", "n3", False), ("", "m9", True), ("r", "n1,n2", False), ("r", "n1,n2,n3", True), ("none,r", "n1,n2,n3", True)],
)
def test_nodes_that_are_reserved_for_others_are_no_others(job, inside, nodes, requeued):
    """Two of three are wanted, and n2 is unfit; a job in reservations has no nodes but those."""
    job.partition("n1", "n2", "n3")
    (job.tools / "reservations").write_text(
        f"ReservationName=r Nodes={nodes} NodeCnt=1 State=ACTIVE Watts=n/a\n"
        "ReservationName=later Nodes=n1,n2,n3 NodeCnt=1 State=INACTIVE Watts=n/a\n"
    )
    given = {"SLURM_JOB_RESERVATION": inside} if inside else {}
    ended = job.start(UNFIT, **given)
    assert ended.requeued == requeued


def test_a_spare_takes_the_place_of_an_unfit_node(tmp_path):
    job = Job(tmp_path, spares=1)
    ended = job.start(UNFIT)
    assert ended.code == 75
    assert "spare: n3" in ended.said
    assert "without n2 in this job from now on" in ended.said
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n1,n3 --overlap " in job.arguments[1]
    assert "--address" not in job.arguments[1]
    assert (job.run / "starts/00002.start").read_text().startswith("slurm job 7, restart 0, on n1,n3, from ")


def test_rank_0_is_found_where_the_node_of_the_script_is_left_out(tmp_path):
    job = Job(tmp_path, spares=1)
    job.start(UNFIT.replace("n2", "n1"))
    assert "--nodelist=n2,n3 " in job.arguments[1]
    assert " --address address-of-n2 " in job.arguments[1]


def test_where_all_nodes_are_unfit_none_is_to_blame(tmp_path):
    job = Job(tmp_path, spares=2)
    ended = job.start('echo "preflight n1, n2: unfit. n1: no room. n2: no room." >"$start.end"; exit 69')
    assert (ended.code, job.starts) == (69, [1])


def test_a_crash_comes_back_and_a_second_one_after_the_same_step_does_not(job):
    ended = job.start(AT_STEP.format(7), AT_STEP.format(9), AT_STEP.format(9))
    assert (ended.code, ended.requeued, job.starts) == (70, False, [1, 2, 3])
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
    ended = job.start(AT_STEP.format(9), "exit 1", AT_STEP.format(9))
    assert (ended.code, ended.requeued) == (70, False)
    assert "crashed twice after step 9" in ended.said


def test_a_save_between_two_crashes_after_the_same_step_makes_them_no_pair(job):
    assert job.start(AT_STEP.format(9), SAVE).requeued
    assert job.start(AT_STEP.format(9), SAVE).requeued
    assert job.starts == [1, 2, 3, 4]


def test_starts_that_never_begin_are_tried_five_times_on_other_nodes_too(job):
    """One more in the job, in case the cause was passing; then the queue, whose nodes may do what these do not."""
    assert job.start("exit 1", "exit 1").requeued
    assert job.starts == [1, 2]
    assert job.start("exit 1").requeued
    assert job.start("exit 1").requeued
    ended = job.start("exit 1")
    assert (ended.code, ended.requeued) == (70, False)
    assert "Five starts in a row" in ended.said


def test_a_job_comes_back_max_restarts_times(tmp_path):
    job = Job(tmp_path, max_restarts=2)
    assert [job.start(SAVE).requeued for _ in range(3)] == [True, True, True]
    ended = job.start(SAVE)
    assert (ended.code, ended.requeued) == (70, False)
    assert "has come back 2 times" in ended.said
    (job.run / "STOPPED").unlink()
    assert job.start(SAVE, SLURM_JOB_ID="8").code == 75  # another job begins to count


def test_a_return_with_a_new_checkpoint_does_not_count(tmp_path):
    """Time limits and preemption, for weeks; a crash that repeats itself without one ends it."""
    job = Job(tmp_path, max_restarts=1)
    checkpoints = job.run / "checkpoints"
    for step in range(1, 6):
        save = f'mkdir -p "{checkpoints}/step-{step:08d}.ckpt"; {SAVE}'
        assert job.start(save).requeued
    ended = job.start(AT_STEP.format(6), AT_STEP.format(7), AT_STEP.format(8))
    assert ended.code == 70
    assert "has come back 1 times, the site profile's max_restarts, without a new checkpoint (step 5)" in ended.said


def test_processes_that_did_not_meet_are_tried_again(job):
    ended = job.start('echo "lost n2: no sign of rank 1 after 20 s." >"$start.end"; exit 69')
    assert (ended.code, job.starts) == (75, [1, 2])
    assert (job.run / "starts/00001.crash").read_text() == "never n2\n"
    assert not (job.run / "STOPPED").exists()


def test_a_node_that_is_to_blame_twice_in_a_row_is_left_out(job):
    job.partition("n1", "n2", "n3")
    ended = job.start(KILLED.format(0), KILLED.format(0))
    assert ended.requeued
    assert job.starts == [1, 2]
    assert (job.run / "starts/00001.end").read_text() == "lost n2: task 1: Killed\n"
    assert "update JobId=7 ExcNodeList=n2" in job.log.read_text()
    # On another node it is the training's own fault.
    assert job.start(KILLED.replace("n2", "n3").format(0)).code == 70
    assert "has crashed 3 times after step 0" in (job.run / "STOPPED").read_text()
    assert "The last time: n3: task 1: Killed" in (job.run / "STOPPED").read_text()


def test_a_spare_takes_the_place_of_a_node_whose_ranks_die_before_their_first_step(tmp_path):
    """At once; after a first step only of one that is to blame twice."""
    job = Job(tmp_path, spares=2)
    (job.run / "checkpoints/step-00000040.ckpt").mkdir(parents=True)
    killed_again = KILLED.replace("n2", "n3")
    ended = job.start(KILLED.format(40), killed_again.format(41), killed_again.format(42))
    assert (ended.code, job.starts) == (75, [1, 2, 3, 4])
    chosen = [(a.split("--nodelist=")[1].split()[0] if "--nodelist" in a else "") for a in job.arguments]
    assert chosen == ["", "n1,n3", "n1,n3", "n1,n4"]
    assert "update JobId=7 ExcNodeList" not in job.log.read_text()  # nothing else is there, as far as SLURM knows


def test_what_dies_before_its_first_step_on_every_node_is_the_trainings_own_fault(tmp_path):
    job = Job(tmp_path, spares=4)
    ended = job.start(*[KILLED.replace("n2", node).format(0) for node in ("n2", "n3", "n4", "n5", "n6")])
    assert (ended.code, job.starts) == (70, [1, 2, 3, 4, 5])
    assert "has crashed 5 times after step 0" in (job.run / "STOPPED").read_text()


NODE_LOST = """echo 'srun: error: Node failure on n2' >&2
echo 'srun: error: n1: task 0: Killed' >&2
echo 'srun: launch/slurm: _step_signal: Terminating StepId=7.0' >&2
echo "9 20 2.5 100 0" >"$start.step"; exit 137"""


def test_a_spare_takes_the_place_of_a_node_that_slurm_has_lost(tmp_path):
    job = Job(tmp_path, spares=1)
    ended = job.start(NODE_LOST)
    assert (ended.code, job.starts) == (75, [1, 2])
    assert "--nodelist=n1,n3 " in job.arguments[1]
    assert (job.run / "starts/00001.end").read_text() == "lost n2: SLURM has lost it.\n"
    assert not (job.run / "starts/00001.crash").exists()  # it says nothing of the step


def test_a_node_on_which_nothing_starts_any_more_is_left_out(tmp_path):
    """SLURM notices after minutes; and its srun would wait for the tasks there."""
    job = Job(tmp_path, spares=1)
    job.dead.write_text("n2")
    ended = job.start('echo "crashed rank 0 on n1 lost its peer." >"$start.end"; exec /bin/sleep 25')
    assert (ended.code, job.starts) == (75, [1, 2])
    assert "--nodelist=n1,n3 " in job.arguments[1]
    words = "lost n2: SLURM can start nothing there any more. rank 0 on n1 lost its peer.\n"
    assert (job.run / "starts/00001.end").read_text() == words


LISTENS = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
time.sleep(99)
"""
PEER_LOST = 'echo "crashed rank 0 on n1 lost its peer." >"$start.end"; exec /bin/sleep {}'


def daemons(job, *ports):
    answers = "; ".join(f"echo n{number} 127.0.0.1 {port}" for number, port in enumerate(ports, 1))
    job._tool("sinfo", f'case "$*" in *Port*) {answers} ;; esac')
    job._tool("sleep", "exec /bin/sleep $1")


def test_a_node_that_takes_no_connection_any_more_is_left_out_at_once(tmp_path):
    """Its slurmd listens nowhere; srun waits for the tasks there, and a step on it would be waited for, too."""
    job = Job(tmp_path, spares=1)
    there, away = (subprocess.Popen([sys.executable, "-c", LISTENS], stdout=subprocess.PIPE) for _ in range(2))
    with there, away:
        ports = [int(each.stdout.readline()) for each in (there, away)]
        daemons(job, ports[0], ports[1], ports[0])
        began = time.monotonic()
        ended = job.start(f"kill {away.pid}; {PEER_LOST.format(60)}")
        there.kill()
    assert (ended.code, job.starts) == (75, [1, 2])
    assert "--nodelist=n1,n3 " in job.arguments[1]
    words = "n2: SLURM's daemon cannot be reached there: it is off, or cut from the others. rank 0 on n1 lost its peer."
    assert (job.run / "starts/00001.end").read_text() == f"lost {words}\n"
    assert not (job.run / "starts/00001.crash").exists()
    assert time.monotonic() - began < 25  # of which six are waited; 60 and more where srun is waited for


@pytest.mark.parametrize("own", [False, True])
def test_nodes_that_never_took_a_connection_are_not_taken_for_lost(tmp_path, own):
    """Behind a firewall, say, where at most this script's own node answers itself."""
    job = Job(tmp_path, spares=1)
    with socket.create_server(("127.0.0.1", 0)) as there, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port, closed = there.getsockname()[1], nobody.getsockname()[1]
        daemons(job, port if own else closed, closed, closed)
        job.start(PEER_LOST.format(9))
    assert (job.run / "starts/00001.end").read_text() == "crashed rank 0 on n1 lost its peer.\n"
    assert (job.run / "starts/00001.crash").exists()


def test_without_spares_a_job_goes_on_with_fewer_nodes_or_through_the_queue(tmp_path):
    (tmp_path / "fewer").mkdir()
    job = Job(tmp_path / "fewer", min_nodes=1)
    ended = job.start(NODE_LOST)
    assert (ended.code, job.starts) == (75, [1, 2])
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n1 " in job.arguments[1]
    assert "trainer.nodes=1 trainer.devices=1 trainer.accumulate=2" in job.arguments[1]
    (tmp_path / "all").mkdir()
    job = Job(tmp_path / "all")
    ended = job.start(NODE_LOST)
    assert (ended.requeued, job.starts) == (True, [1])


def test_where_no_node_is_left_the_one_to_blame_is_named(job):
    job.partition("n1", "n2")
    assert job.start(KILLED.format(4), KILLED.format(4)).code == 70
    assert not job.log.exists()
    stopped = (job.run / "STOPPED").read_text()
    assert "crashed twice after step 4" in stopped
    assert "Twice because of n2: have it looked at, and leave it out (exclude in the site's profile)." in stopped


def test_a_reason_that_names_all_nodes_blames_none(job):
    job.start('echo "lost n1, n2: they met, but a collective did not end." >"$start.end"; exit 69')
    assert job.starts == [1, 2]
    assert (job.run / "starts/00001.crash").read_text() == "never \n"


def test_tasks_get_the_environment_of_the_script(job):
    """`sbatch --export=NONE` has srun give its tasks nothing of it."""
    job.start(SAVE, SLURM_EXPORT_ENV="NONE")
    assert " --export=ALL " in job.arguments[0]


def test_a_job_of_a_chain_leaves_the_rest_to_the_next(tmp_path):
    job = Job(tmp_path, comes_back=False)
    ended = job.start(AT_STEP.format(3), SAVE)
    assert (ended.code, ended.requeued, job.starts) == (75, False, [1, 2])
    assert "the chain's next job" in ended.said


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "NODE_FAIL", "PREEMPTED"])
def test_a_job_that_slurm_is_ending_is_left_to_it(job, state):
    ended = job.start('echo "9 20 2.5 100 0" >"$start.step"; exit 143', STATE=state)
    assert (ended.code, ended.requeued, job.starts) == (75, False, [1])
    assert not list((job.run / "starts").glob("*.crash"))  # no fault of the training's


def test_a_job_that_is_cancelled_while_it_waits_to_come_back_does_not(job):
    job._tool(
        "squeue",
        f"""case "$*" in *%e*) exit ;; esac
if [ -e "{job.tools}/asked" ]; then echo CANCELLED; else touch "{job.tools}/asked"; echo RUNNING; fi""",
    )
    ended = job.start(SAVE)
    assert (ended.code, ended.requeued) == (75, False)


def unanswered(job: Job, times: int, until: str = "2099-01-01T00:00:00") -> None:
    """SLURM's controller is away for so many questions once the training has ended."""
    job._tool(
        "squeue",
        f"""case "$*" in *%e*) echo {until}; exit ;; esac
echo >>"{job.tools}/asked"
if [ "$(wc -l <"{job.tools}/asked")" -le {times} ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
fi
echo RUNNING""",
    )


@pytest.mark.parametrize("does", [SAVE, AT_STEP.format(3)])
def test_a_controller_that_is_away_is_waited_for(job, does):
    unanswered(job, 12)
    ended = job.start(does)
    assert (ended.code, ended.requeued) == (75, True)
    sentence = "SLURM does not answer (slurm_load_jobs error: Unable to contact slurm controller (connect failure)): "
    assert ended.said.count(f"{sentence}it is asked again until it does, or until the job's time limit") == 1
    assert ended.said.count("slept 15") == 12
    assert "SLURM answers again" in ended.said


def test_a_controller_that_is_away_is_not_waited_for_beyond_the_time_limit(job):
    unanswered(job, 50, until="2020-01-01T00:00:00")
    ended = job.start(SAVE)
    assert (ended.code, ended.requeued) == (75, False)
    assert "SLURM has not answered until the job's time limit: go on with `longseq submit`" in ended.said


def test_a_job_that_slurm_has_forgotten_says_so(job):
    job._tool("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    ended = job.start(SAVE)
    assert (ended.code, ended.requeued) == (75, False)
    assert "SLURM does not know this job any more: go on with `longseq submit`" in ended.said


def test_a_refused_return_is_tried_ten_times(job):
    job._tool("scontrol", "echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    ended = job.start(SAVE)
    assert (ended.code, ended.said.count("presently disabled")) == (75, 10)
    assert "cannot come back, SLURM says why above: go on with `longseq submit`" in ended.said


ASKED = (
    """trap 'echo saved >"$start.end"; exit 0' USR1; kill -{} $PPID; for _ in {{1..900}}; do /bin/sleep 0.05; done"""
)


@pytest.mark.parametrize("signal", ["TERM", "USR1"])
def test_a_signal_reaches_the_training_and_what_it_says_then_counts(job, signal):
    """SIGTERM is preemption's, with a time of grace: a job that just ended would not come back."""
    ended = job.start(ASKED.format(signal))
    assert (ended.code, ended.requeued) == (75, True)
    assert f"{signal}: the training is asked to save" in ended.said


def test_what_crashes_once_it_was_asked_to_leave_comes_back_by_the_queue(job):
    crash = ASKED.format("USR1").replace('echo saved >"$start.end"; exit 0', AT_STEP.format(3))
    ended = job.start(crash)
    assert (ended.code, ended.requeued, job.starts) == (75, True, [1])


def test_what_could_not_be_noted_on_a_full_disk_is_read_from_the_log(job):
    sentence = "/runs/a: No space left on device; make room, or choose another disk."
    ended = job.start(f'echo "longseq: error: {sentence}" >&2; : >"$start.end"; exit 76')
    assert f"crashed after step never: {sentence}" in ended.said
    assert starts.read_end(job.run / "starts", 1) == f"crashed {sentence}"


def test_a_start_that_was_overtaken_touches_nothing(job):
    overtake = 'touch "$run/starts/00002.start"; exit 143'
    ended = job.start(overtake)
    assert (ended.code, ended.requeued) == (77, False)
    assert "start 00002 has this run now" in ended.said
    assert sorted(path.name for path in (job.run / "starts").iterdir()) == ["00001.start", "00002.start"]
    assert not (job.run / "STOPPED").exists()


def test_nodes_and_batches_are_those_of_the_nodes_that_came(tmp_path):
    job = Job(tmp_path, min_nodes=1)
    job.start(SAVE)
    assert "--nodes=2 --ntasks=2 " in job.arguments[0]
    assert "trainer.nodes=2 trainer.devices=1 trainer.accumulate=1" in job.arguments[0]
    job.nodes = 1
    job.partition()
    job.start(SAVE)
    assert "--nodes=1 --ntasks=1 " in job.arguments[1]
    assert "trainer.nodes=1 trainer.devices=1 trainer.accumulate=2" in job.arguments[1]


def test_a_member_of_an_array_speaks_for_itself_alone(job):
    """SLURM takes the number of an array for all of its members."""
    job._tool("squeue", f'echo "$*" >>"{job.tools}/asked"; case "$*" in *%T*) echo RUNNING ;; esac')
    job.start(SAVE, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert "requeue 7_2\n" in job.log.read_text()
    asked = (job.tools / "asked").read_text().splitlines()
    assert asked
    assert all("--jobs=7_2 " in f"{line} " for line in asked)


def test_a_signal_between_two_starts_is_a_wish_to_come_back(job):
    """It reaches the script while SLURM is asked whether the job goes on, and nothing trains."""
    job._tool(
        "squeue",
        f'''case "$*" in *%T*) echo RUNNING; [ ! -e "{job.tools}/now" ] || echo x >>"{job.tools}/asked" ;; esac
[ "$(cat "{job.tools}/asked" 2>/dev/null | wc -l)" = 2 ] || exit 0
script=$PPID # or a subshell of it
if cmp -s /proc/$script/cmdline "/proc/$(ps -o ppid= -p $script | tr -d " ")/cmdline"; then
    script=$(ps -o ppid= -p $script)
fi
kill -USR1 $script''',
    )
    ended = job.start(AT_STEP.format(7))
    assert (ended.code, ended.requeued, job.starts) == (75, True, [1])


def test_nobody_is_blamed_for_a_signal_that_the_script_has_sent(job):
    told = "echo 'srun: error: n2: task 1: User defined signal 1' >&2; exit 138"
    ended = job.start(told)
    assert "lost n2" not in ended.said
    assert "srun's exit code is 138" in ended.said
