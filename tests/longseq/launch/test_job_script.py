"""What a job script decides when its training has ended."""

from __future__ import annotations

import pytest
from tests.longseq.launch.scripted_job import AT_STEP, REFUSED, SAVE, Job

from longseq.runs import starts


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


def test_a_crash_is_followed_by_a_start_in_the_same_job(job):
    ended = job.start(AT_STEP.format(7))
    assert (ended.code, ended.requeued) == (75, True)  # by the second start, which saved
    assert job.starts == [1, 2]
    assert "goes on in this job, without the queue" in ended.said
    assert [(job.run / f"starts/0000{n}.start").read_text().split(" on ")[0] for n in (1, 2)] == [
        "slurm job 7, restart 0,"
    ] * 2
    assert ["--overlap" in arguments for arguments in job.arguments] == [False, True]
    assert not any("--nodelist" in arguments for arguments in job.arguments)


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
