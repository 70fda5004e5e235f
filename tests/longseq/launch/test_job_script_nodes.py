"""Which nodes a job script leaves out, takes for lost, and starts on."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from tests.longseq.launch.scripted_job import AT_STEP, KILLED, SAVE, UNFIT, Job


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


# Takes connections; after SIGUSR1 those that come get no answer, as of a machine that is off: the queue of those to be
# accepted is full then.
LISTENS = """
import signal, socket, time

def off(*_):
    raise TimeoutError

signal.signal(signal.SIGUSR1, off)
server = socket.create_server(("127.0.0.1", 0), backlog=0)
try:
    print(server.getsockname()[1], flush=True)
    while True:
        server.accept()[0].close()
except TimeoutError:
    waiting = [socket.socket() for _ in range(4)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(server.getsockname())
    print("off", flush=True)
    time.sleep(99)
"""
PEER_LOST = 'echo "crashed rank 0 on n1 lost its peer." >"$start.end"; exec /bin/sleep 60'


class Daemons:
    """SLURM's, of nodes n1, n2, …"""

    def __init__(self, job: Job):
        command = [sys.executable, "-c", LISTENS]
        self.all = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(job.nodes)]
        answers = [f"echo n{number} 127.0.0.1 {each.stdout.readline()}" for number, each in enumerate(self.all, 1)]
        job._tool("sinfo", f'case "$*" in *Port*)\n{"".join(answers)};; esac')
        job._tool("sleep", "exec /bin/sleep $1")

    def signals(self, kind: str, *nodes: int) -> str:
        return f"kill -{kind} {' '.join(str(self.all[node - 1].pid) for node in nodes)}; "

    def off(self, *nodes: int) -> None:
        for node in nodes:
            self.all[node - 1].send_signal(signal.SIGUSR1)
            assert self.all[node - 1].stdout.readline() == "off\n"


@pytest.fixture
def daemons():
    made: list[Daemons] = []

    def of(job: Job) -> Daemons:
        made.append(Daemons(job))
        return made[0]

    yield of
    for each in made[0].all:
        each.kill()
        each.communicate()


def test_a_node_that_gives_no_answer_any_more_is_left_out_at_once(tmp_path, daemons):
    """srun waits for the tasks there, and a step on it would be waited for, too."""
    job = Job(tmp_path, spares=1)
    ended = job.start(daemons(job).signals("USR1", 2) + PEER_LOST)
    assert (ended.code, job.starts) == (75, [1, 2])
    assert "--nodelist=n1,n3 " in job.arguments[1]
    words = "n2: SLURM's daemon cannot be reached there: it is off, or cut from the others. rank 0 on n1 lost its peer."
    assert (job.run / "starts/00001.end").read_text() == f"lost {words}\n"
    assert not (job.run / "starts/00001.crash").exists()


def crashed_of_itself(job: Job) -> None:
    assert (job.run / "starts/00001.end").read_text() == "crashed rank 0 on n1 lost its peer.\n"
    assert (job.run / "starts/00001.crash").exists()
    assert not any("--nodelist" in arguments for arguments in job.arguments)


@pytest.mark.parametrize("never", [(2,), (2, 3), (1, 2, 3)])
def test_nodes_that_never_gave_an_answer_are_not_taken_for_lost(tmp_path, daemons, never):
    """Behind a firewall, say, where at most this script's own node answers itself."""
    job = Job(tmp_path, spares=1)
    daemons(job).off(*never)
    job.start(PEER_LOST)
    crashed_of_itself(job)


def test_a_daemon_that_is_down_is_no_lost_node(tmp_path, daemons):
    """It is upgraded, say; the machine itself says that nobody listens."""
    job = Job(tmp_path, spares=1)
    job.start(daemons(job).signals("KILL", 2) + PEER_LOST)
    crashed_of_itself(job)


def test_where_no_other_node_answers_it_is_the_own_one_that_is_cut_off(tmp_path, daemons):
    job = Job(tmp_path, nodes=3, spares=1)
    job.start(daemons(job).signals("USR1", 2, 3) + PEER_LOST)
    crashed_of_itself(job)


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
