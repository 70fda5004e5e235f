"""Which rank is to blame when a training stands still: by what the ranks say, and by the time that passes."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longseq.launch import processes
from longseq.launch.watchdog import Finding, Judge, Look, Ward, keep_all, sentence
from longseq.runs.run import Run
from longseq.training.vitals import Sign, Vitals

NODES = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}
STEP = Sign(beat=0, batch=12, mark=5, doing="backward", limit=60, silence=60)


def facts(sign: Sign, state: str = "", stopped_worker: int = 0, moved: int = 0) -> dict[str, object]:
    return {"sign": asdict(sign), "state": state, "stopped_worker": stopped_worker, "moved": moved}


class Heard:
    """A judge of four ranks, two a node, and what it finds while time passes."""

    def __init__(self, *signs: Sign, **more: object):
        self.judge = Judge({rank: NODES[rank] for rank in range(len(signs))}, **more)  # type: ignore[arg-type]
        self.signs = list(signs)
        self.states: dict[int, str] = {}
        self.workers: dict[int, int] = {}
        self.moved: dict[int, int] = {}
        self.silent: set[int] = set()
        self.beat = 0
        self.hear()

    def hear(self) -> None:
        self.beat += 1
        for rank, sign in enumerate(self.signs):
            beat = 1 if rank in self.silent else self.beat
            more = self.states.get(rank, ""), self.workers.get(rank, 0), self.moved.get(rank, 0)
            self.judge.hear(rank, facts(replace(sign, beat=beat), *more))

    def after(self, seconds: int) -> Finding:
        """The first finding that ends, within so many seconds, or the last one."""
        for _ in range(seconds):
            self.hear()
            found = self.judge.look(1.0)
            if found.ends:
                return found
        return found


def test_a_rank_that_goes_silent_is_named_warned_of_and_ends_the_start():
    heard = Heard(*[replace(STEP, device=f"cuda:{rank % 2}", limit=1e9) for rank in range(4)])
    heard.silent = {3}
    assert heard.after(28) == Finding()
    warned = heard.after(2)
    assert (warned.ends, warned.ranks) == (False, [3])
    assert warned.text.startswith("node2: rank 3 (cuda:1) has not answered for 3")
    found = heard.after(31)
    assert (found.text, found.ends) == ("node2: rank 3 (cuda:1) has not answered for 60 s", True)


def test_a_rank_that_answers_again_is_forgiven():
    heard = Heard(*[replace(STEP, limit=1e9)] * 2)
    heard.silent = {0, 1}
    assert heard.after(40).text == "node1: rank 0 (cpu), 1 (cpu) have not answered for 40 s"
    heard.silent = set()
    assert heard.after(1) == Finding()


@pytest.mark.parametrize(
    ("state", "seconds", "why"),
    [("stopped", 60, "stopped by a signal or a debugger"), ("storage", 600, "waiting for storage")],
)
def test_the_kernel_says_why_a_rank_is_silent_and_storage_may_take_longer(state, seconds, why):
    heard = Heard(*[replace(STEP, limit=1e9)] * 4)
    heard.silent, heard.states = {2}, {2: state}
    assert not heard.after(seconds - 2).ends
    assert heard.after(3).text == f"node2: rank 2 (cpu) has not answered for {seconds} s: {why}"


def test_a_process_that_has_ended_is_not_blamed():
    heard = Heard(*[replace(STEP, limit=1e9)] * 2)
    heard.silent, heard.states = {1}, {1: "gone"}
    assert heard.after(200) == Finding()


def test_the_rank_that_the_others_wait_for_is_named_with_what_it_does():
    heard = Heard(STEP, STEP, replace(STEP, mark=3, doing="forward"), STEP)
    assert not heard.after(58).ends
    found = heard.after(3)
    assert found == Finding("node2: rank 2 (cpu) has kept the others waiting for 60 s, at forward", [2], ends=True)


def test_the_place_of_the_rank_that_is_behind_decides_how_long_it_may_take():
    heard = Heard(STEP, replace(STEP, batch=11, limit=600, doing="validation"))
    assert not heard.after(598).ends
    assert heard.after(3).text == "node1: rank 1 (cpu) has kept the others waiting for 600 s, at validation"


def test_where_all_wait_at_the_same_place_nobody_is_blamed_alone():
    found = Heard(STEP, STEP, STEP, STEP).after(61)
    assert found.text == "node1, node2: no rank has gone on for 60 s, all at the same place, at backward"
    assert found.ranks == []
    assert Heard(STEP).after(61).text == "node1: rank 0 (cpu) has not gone on for 60 s, at backward"


def test_a_data_worker_that_is_stopped_is_named_long_before_data_would_take_too_long():
    data = replace(STEP, batch=11, limit=600, waits_for_data=True, doing="next")
    heard = Heard(STEP, data, STEP, data)
    heard.workers = {3: 4711}
    found = heard.after(61)
    assert found.text == (
        "node2: rank 3 (cpu) has kept the others waiting for 60 s, waiting for its data worker (process 4711), "
        "which is stopped"
    )


def test_marks_and_bytes_are_signs_of_life():
    heard = Heard(replace(STEP, limit=60), replace(STEP, limit=60))
    for number in range(30):
        heard.moved[1] = number * (2 << 20)
        assert not heard.after(50).ends
    for number in range(30):
        heard.signs[0] = replace(STEP, mark=6 + number)
        assert not heard.after(50).ends
    assert heard.after(61).ends


def test_nobody_ends_a_start_that_is_not_to_be_watched():
    heard = Heard(*[replace(STEP, silence=0.0, limit=0.0)] * 2)
    heard.silent = {1}
    assert heard.after(5000) == Finding()


def test_the_guards_of_the_others_judge_only_whether_rank_0_answers():
    heard = Heard(STEP, silence_only=True)
    assert heard.after(500) == Finding()
    heard.silent = {0}
    assert heard.after(600).text == "node1: rank 0 (cpu) has not answered for 60 s"


def test_limits_follow_the_steps(monkeypatch):
    vitals = Vitals()
    clock = [0.0]
    monkeypatch.setattr("longseq.training.vitals.time.monotonic", lambda: clock[0])
    assert vitals.limit() == 1800
    for seconds in (500.0, 500.0, 20.0, 20.0, 20.0, 90.0):  # the first two compile
        vitals.begin_batch()
        clock[0] += seconds
        vitals.end_batch()
    assert vitals.limit() == 2000
    vitals.begin_batch()
    assert vitals.limit() == 200
    vitals.compiling = 1
    assert vitals.limit() == 6000
    vitals.within = 7.0
    assert vitals.limit() == 7


@pytest.mark.parametrize("hang_seconds", [1e-9, 0.5, 1.0, 2.0, 5.0])
def test_a_rank_that_answers_each_second_is_never_silent(hang_seconds):
    vitals = Vitals()
    vitals.hang_seconds = hang_seconds
    assert vitals.sign().silence == 5
    judge = Judge({0: "node1"})
    for second in range(100):
        if second % 3 == 0:  # on a busy machine
            judge.hear(0, facts(replace(vitals.sign(), mark=second)))
        assert judge.look(1.1) == Finding()


def test_nothing_hangs_where_that_is_switched_off():
    vitals = Vitals()
    vitals.hang_seconds = 0.0
    assert vitals.sign().silence == 0


def test_the_time_in_which_the_watcher_itself_stood_still_does_not_count(tmp_path, monkeypatch):
    heard = Heard(STEP, STEP)
    look = Look(Run(tmp_path, 1), heard.judge)
    clock = [look.before]
    monkeypatch.setattr("longseq.launch.watchdog.time.monotonic", lambda: clock[0])
    clock[0] += 10_000
    assert look() is None
    for _ in range(29):
        heard.hear()
        clock[0] += 2
        found = look()
    assert found is not None


RANK = """
import sys, threading, time, socket, os
import torch, torch.distributed as dist
from torch.distributed import HashStore
from pathlib import Path
from longseq.training.vitals import Vitals, stacks_on_request
from longseq_data import children

channel, stacks, trace = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
stacks_on_request(stacks)
dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(7))
vitals = Vitals(socket.socket(fileno=channel), trace)
children.start("a_worker", None)
def a_rank_that_waits():
    vitals.at("waiting")
    time.sleep(1000)
a_rank_that_waits()
"""


WORKER = """
import os, time
def work():
    print(os.getpid(), file=open("at-work", "w"), flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def ward():
    ward = Ward(0)
    yield ward
    ward.close()


def test_stacks_and_collectives_of_a_stopped_rank_and_its_worker_are_kept(tmp_path, ward):
    """With native frames too, where gdb or py-spy may look."""
    run = Run(tmp_path, 1)
    run.starts_dir.mkdir()
    files = ward.theirs.fileno(), ward.stacks.fileno()
    command = [sys.executable, "-c", RANK, *map(str, files), str(run.trace_of(0))]
    (tmp_path / "a_worker.py").write_text(WORKER)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    with subprocess.Popen(command, pass_fds=files, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path) as process:
        try:
            ward.pid = process.pid
            until(lambda: ward.facts()["sign"]["doing"] == "waiting" and (tmp_path / "at-work").exists())
            (worker,) = processes.descendants(process.pid)
            os.kill(worker, signal.SIGSTOP)
            os.kill(process.pid, signal.SIGSTOP)
            until(lambda: ward.facts()["state"] == "stopped" and processes.state(worker) == "stopped")
            keep_all(run, [ward], Finding("node1: rank 0 (cpu) has not answered for 60 s", [0], ends=True))
            assert process.poll() is None  # it is asked, and not ended
            said = sentence(run, "node1: it hangs")
        finally:
            os.kill(worker, signal.SIGKILL)
            process.kill()
    text = run.stacks_of(0).read_text()
    assert text.startswith("node1: rank 0 (cpu) has not answered for 60 s\n")
    assert "in a_rank_that_waits" in text
    assert f"--- process {worker} (a data worker, perhaps)" in text
    assert 'a_worker.py", line 5 in work' in text
    assert said.startswith(f"node1: it hangs (trainer.hang_seconds). What each rank was doing: {run.stacks_of('*')}. ")
    entry = pickle.loads(run.trace_of(0).read_bytes())["entries"][-1]
    assert (entry["profiling_name"], entry["input_sizes"]) == ("gloo:all_reduce", [[7]])


def test_a_process_that_would_end_by_the_signal_is_left_alone(tmp_path):
    with (tmp_path / "stacks").open("w+b") as file, subprocess.Popen(["sleep", "1000"]) as process:
        until(lambda: processes.state(process.pid) == "" and b"sleep" in cmdline(process.pid))
        text = "".join(processes.stacks(process.pid, file, native=False))
        assert process.poll() is None
        process.kill()
    assert re.match(f"--- process {process.pid}: sleep 1000\nthread {process.pid} sleep: state [SR]", text), text


def test_a_rank_whose_guard_is_ending_it_does_not_say_how_it_failed(ward):
    ward.wait_to_be_ended()  # not yet
    ward.ends[0] = 1
    threading.Timer(0.5, ward.ends.__setitem__, (0, 0)).start()
    begun = time.monotonic()
    ward.wait_to_be_ended()
    assert time.monotonic() - begun > 0.4


def test_states_and_bytes_are_those_of_the_kernel(tmp_path):
    code = "import os, sys\nopen(sys.argv[1], 'wb').write(bytes(3 << 20))\nprint(os.getpid(), flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "large"], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        assert process.pid in processes.descendants(os.getpid())
        assert 3 << 20 <= processes.bytes_moved(process.pid) < 64 << 20
        process.kill()
    assert processes.state(process.pid) == "gone"


def test_a_rank_whose_watcher_does_not_listen_for_a_while_is_heard_again(ward, monkeypatch):
    monkeypatch.setattr("longseq.training.vitals.BEAT_SECONDS", 0.001)
    vitals = Vitals(ward.theirs)
    until(lambda: vitals.sign().beat > 2000)  # more than the socket holds
    vitals.at("here")
    until(lambda: ward.facts()["sign"]["doing"] == "here")


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
