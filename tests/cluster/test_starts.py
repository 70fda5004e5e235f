"""Starts on clusters as they are: addresses, ports and environments that mislead, nodes that hang or are sick."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import longseq
import longseq_data
from command_line import alive
from longseq.config.durations import duration_seconds
from longseq.runs import starts

from .conftest import ENDED, Login

pytestmark = pytest.mark.distributed

LONG = ("data.batch_tokens=12288", "trainer.max_steps=60", "trainer.valid_every=0", "trainer.checkpoint_every=30")


@pytest.fixture
def debian(login: Login) -> Iterator[None]:
    """/etc/hosts of every node as Debian and Ubuntu write it; the last one's name is not even in its own."""
    cluster = login.cluster
    for node in cluster.nodes if cluster.netns else ():
        hosts = cluster.folder / f"hosts-{node}"
        own = f"127.0.1.1 {node}\n" if node != cluster.nodes[-1] else ""
        hosts.write_text(f"127.0.0.1 localhost\n{own}10.77.0.1 login\n")
        cluster.tell(node, f"mount --bind {hosts} /etc/hosts && touch {hosts}.bound")
    for node in cluster.nodes if cluster.netns else ():
        _until(lambda path=cluster.folder / f"hosts-{node}.bound": path.exists(), "a bound /etc/hosts")
    yield
    for node in cluster.nodes if cluster.netns else ():
        cluster.tell(node, "umount /etc/hosts")


def test_a_misleading_address_a_taken_port_and_no_environment_do_not_keep_a_run_from_starting(
    login: Login, debian: None
) -> None:
    """127.0.1.1 in /etc/hosts, a name that does not resolve, MASTER_PORT in use on every node, sbatch --export=NONE."""
    cluster = login.cluster
    job = int(cluster.run("sbatch", "--parsable", "--hold", "--wrap=true"))
    cluster.run("scancel", job)
    port = 20_000 + ((job + 1) * 101 + 7) % 12_000  # of its first start
    taken = login.folder / "taken.py"
    taken.write_text(
        "import pathlib, socket, sys, time\n"
        f"taken = socket.socket()\ntaken.bind(('0.0.0.0', {port}))\ntaken.listen()\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(120)\n"
    )
    for node in cluster.nodes if cluster.netns else cluster.nodes[:1]:
        ready = cluster.folder / f"taken-{node}"
        cluster.tell(node, f"python3 '{taken}' {ready}")
        _until(ready.exists, "a taken port")
    site = (login.folder / "site.yaml").read_text()
    path = cluster.environment.get("PYTHONPATH", "")
    site = site.replace("'1'}", f"'1', MARK: 'it is here', PYTHONPATH: '{path}'}}\nsbatch: ['--export=NONE']")
    (login.folder / "none.yaml").write_text(site)
    job_id, run = login.submit("misled", "--nodes=3", "--site=none.yaml", *LONG)
    assert int(job_id) == job + 1
    login.wait_for_step(run, 1)
    (task,) = login.tasks(cluster.nodes[1]) if cluster.netns else login.tasks(cluster.nodes[0])[:1]
    environment = Path(f"/proc/{task}/environ").read_bytes().split(b"\0")
    assert b"MARK=it is here" in environment
    if cluster.netns:
        inside = [*cluster._enter(cluster.nodes[-1]), "getent", "hosts"]
        known = [subprocess.run([*inside, name], capture_output=True).stdout for name in (cluster.nodes[-1], "login")]
        assert [bool(line) for line in known] == [False, True]
    assert b"PYTHONSAFEPATH=1" in environment
    assert cluster.wait_for(job_id, *ENDED) == "COMPLETED", login.log(run)
    assert starts.numbers(run / "starts") == [1]
    assert int((run / "starts/00001.port").read_text()) != port


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(login: Login) -> None:
    cluster = login.cluster
    (login.folder / "hang.yaml").write_text((login.folder / "site.yaml").read_text() + "hang_seconds: 10\n")
    job, run = login.submit("hangs", "--nodes=2", "--site=hang.yaml", *LONG)
    login.wait_for_step(run, 5)
    node = [node for node in cluster.nodes if login.tasks(node)][-1]
    for pid in login.tasks(node):
        os.kill(pid, signal.SIGSTOP)
    _until(lambda: (run / "starts/00001.end").exists(), "the end of the start", 120)
    said = starts.read_end(run / "starts", 1)
    assert said is not None
    stopped = rf"lost {node}: rank 1 \(cpu\) has not answered for \d+ s: stopped by a signal or a debugger \("
    assert re.match(stopped, said), said
    assert "torchfrtrace" in said
    for rank in range(2):  # the guard of each node keeps them
        stacks = (run / f"starts/00001.stacks-{rank}.txt").read_text()
        assert re.search(r"fit.py\", line \d+ in run_to_its_end", stacks), stacks
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    assert starts.numbers(run / "starts") == [1, 2]


def test_a_job_that_comes_back_runs_the_code_that_was_submitted(login: Login, tmp_path: Path) -> None:
    """The checkout is edited while the job waits: a syntax error, which would end any start of it."""
    cluster = login.cluster
    for package in (longseq, longseq_data):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    site = (login.folder / "site.yaml").read_text().replace("'1'}", f"'1', PYTHONPATH: '{tmp_path}'}}")
    (login.folder / "checkout.yaml").write_text(site)
    job, run = login.submit("edited", "--site=checkout.yaml", *LONG)
    (name,) = [path.name for path in (run / "code").iterdir() if path.is_dir()]
    assert name == (run / "code/used").read_text().strip() == json.loads(login.type("status", run, "--json"))["code"]
    (tmp_path / "longseq" / "training" / "fit.py").write_text("this is no Python")
    (tmp_path / "longseq_data" / "datamodule.py").write_text("nor is this")
    login.wait_for_step(run, 5)
    cluster.run("scontrol", "requeue", job)
    login.wait_for_step(run, 6, start=2)
    (task,) = [pid for node in cluster.nodes for pid in login.tasks(node)]
    mapped = Path(f"/proc/{task}/environ").read_bytes().split(b"\0")
    page = login.type("watch", run, "--once")
    assert re.search(rf"^state     RUNNING\njob       {job} on \w+, [\d:-]+ left\nstep      \d+ of 60", page, re.M), (
        page
    )
    assert re.search(r"^start 1 .*\nstart 2   slurm job .*: to step \d+$", page, re.M), page
    assert f"PYTHONPATH={run}/code/{name}:{tmp_path}".encode() in mapped
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    assert starts.numbers(run / "starts") == [1, 2]
    assert login.log(run).count(f"code {name}, as it was submitted") == 2
    assert "state     FINISHED" in login.type("watch", run)  # no terminal: once


def test_an_evaluation_runs_the_submitted_code_and_an_old_start_of_it_keeps_nothing(
    login: Login, tmp_path: Path
) -> None:
    """The checkout is edited before it starts; then its node is lost, it starts anew, and its old process wakes up."""
    cluster = login.cluster
    for package in (longseq, longseq_data):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    job, run = login.submit("scored", "trainer.max_steps=1", "trainer.valid_every=0")
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    site = (login.folder / "site.yaml").read_text().replace("'1'}", f"'1', PYTHONPATH: '{tmp_path}'}}")
    (login.folder / "later.yaml").write_text(site + "sbatch: ['--begin=now+1hour']\n")
    words = ("submit", run, "--job=evaluate", "--site=later.yaml", "data.test=proteins.fasta")
    job = login.type(*words).split()[1]
    (tmp_path / "longseq/evaluation/evaluate.py").write_text("this is no Python")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    first = run / f"slurm/evaluate-{job}.fence/00001.start"
    _until(lambda: [node for node in cluster.nodes if _verbs(cluster.processes(node))], "the evaluation", 120)
    node = next(node for node in cluster.nodes if _verbs(cluster.processes(node)))
    old = _verbs(cluster.processes(node))
    assert f"LONGSEQ_START={first}".encode() in Path(f"/proc/{old[0]}/environ").read_bytes().split(b"\0")
    cluster.kill_slurmd(node)
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    try:
        assert cluster.wait_for(job, *ENDED) == "COMPLETED"
        (kept,) = (run / "evaluations").glob("*.json")
        before = kept.read_bytes()
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        _until(lambda: not any(map(alive, old)), "the end of the old process", 60)
    finally:
        cluster.start_node(node)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    assert [path.read_bytes() for path in (run / "evaluations").glob("*.json")] == [before]
    assert starts.numbers(first.parent) == [1, 2]
    log = (run / f"slurm/evaluate-{job}.log").read_text()
    assert log.count(", as it was submitted") == 2
    assert "perplexity" in log
    cluster.wait_until_idle()


def _verbs(pids: list[int]) -> list[int]:
    """Those that evaluate: srun's words are the same."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:4] == [b"-m", b"longseq.cli", b"evaluate"]:
                found.append(pid)
    return found


def test_a_sick_node_is_left_out(login: Login) -> None:
    """The rank on one node is killed at every start; another node is idle."""
    cluster = login.cluster
    if not cluster.netns:
        pytest.skip("nodes share their processes without namespaces")
    job, run = login.submit("sick", "--nodes=2", *LONG)
    login.wait_for_step(run, 0)
    sick = [node for node in cluster.nodes if login.tasks(node)][-1]
    login.kill_task(sick)
    login.wait_for_step(run, 0, start=2)
    login.kill_task(sick)
    login.wait_for_step(run, 0, start=3)
    assert [starts.read_end(run / "starts", number) for number in (1, 2)] == [f"lost {sick}: task 1: Killed"] * 2
    assert not login.tasks(sick), login.log(run)
    assert f"without {sick} from now on" in login.log(run)
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    assert f"ExcNodeList={sick}" in cluster.run("scontrol", "show", "job", job)


def test_a_node_that_is_unfit_ends_the_job_with_69(login: Login) -> None:
    site = (login.folder / "site.yaml").read_text().replace("disk_gib: 0.01", "disk_gib: 100000")
    (login.folder / "unfit.yaml").write_text(site)
    job, run = login.submit("unfit", "--nodes=2", "--site=unfit.yaml", *LONG)
    assert login.cluster.wait_for(job, *ENDED) == "FAILED"
    assert "ExitCode=69:0" in login.cluster.run("scontrol", "show", "job", job)
    assert not (run / "STOPPED").exists()
    state = json.loads(login.type("status", run, "--json"))
    assert state["state"] == "FAILED"
    assert "preflight_disk_gib=100000" in state["why"]


def test_times_are_read_as_slurm_reads_them(login: Login) -> None:
    """SLURM counts in whole minutes, rounded up."""
    cluster = login.cluster
    for written in ("90:30", "2:30:00", "1-12", "1-12:30", "1-12:30:15", "00:30", "0-2", "2:5"):
        job = cluster.run("sbatch", "--parsable", "--hold", f"--time={written}", "--wrap=true").strip()
        shown = re.search(r"TimeLimit=(\S+)", cluster.run("scontrol", "show", "job", job))
        cluster.run("scancel", job)
        assert shown is not None
        seconds = duration_seconds(shown[1])
        assert -(-duration_seconds(written) // 60) * 60 == seconds, (written, shown[1])


@pytest.mark.long
def test_a_node_that_is_slow_once_costs_a_start_and_not_the_run(login: Login) -> None:
    cluster = login.cluster
    (login.folder / "slow.yaml").write_text((login.folder / "site.yaml").read_text() + "preflight_seconds: 10\n")
    job, run = login.submit("slow", "--nodes=2", "--site=slow.yaml", *LONG)
    login.wait_for_step(run, 5)
    cluster.run("scontrol", "requeue", job)
    _until(lambda: (run / "starts/00002.start").exists(), "the second start", 40)
    last: list[int] = []
    while not last:
        last = [pid for node in cluster.nodes for pid in login.tasks(node) if _rank(pid) == b"1"]
    os.kill(last[0], signal.SIGSTOP)
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    said = starts.read_end(run / "starts", 2)
    assert said is not None
    assert "no sign of rank 1 after 10 s (preflight_seconds)." in said


def _rank(pid: int) -> bytes:
    with suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((v.partition(b"=")[2] for v in variables if v.startswith(b"SLURM_PROCID=")), b"")
    return b""


def _until(condition: object, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.05)
