"""Jobs on a real SLURM cluster: a training on two nodes, a sweep, a chain, and the commands that look at them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.slurm import Cluster, missing
from command_line import LONGSEQ, curve, largest_difference

from .conftest import ENDED, Login

pytestmark = pytest.mark.distributed


def test_two_nodes_of_two_tasks_train_as_one_process_does(login: Login, here: Callable[..., Path]) -> None:
    job, run = login.submit("two-by-two", "--nodes=2", "--gpus-per-node=2", "trainer.zero_stage=2")
    follower = login.begin("logs", "-f", run)
    assert login.cluster.wait_for(job, *ENDED) == "COMPLETED", login.log(run)
    assert (run / "FINISHED").read_text() == "20\n"

    followed, _ = follower.communicate(timeout=60)  # it ends by itself
    assert follower.returncode == 0
    for text in ("start 00001 of", "preflight 4 processes on node1, node2; gloo", "step 20/20", "finished: "):
        assert text in followed
        assert text in login.log(run)
    assert "step 20/20" not in "".join(log.read_text() for log in (run / "logs").glob("*"))
    assert sorted(log.name for log in (run / "logs").glob("*")) == [f"rank-{rank}.log" for rank in (1, 2, 3)]
    assert "rank 3 on node2" in login.type("logs", run, "--rank=3")
    assert json.loads((run / "environment.json").read_text())[0]["world_size"] == 4

    one = here("one-process", "trainer.zero_stage=2")
    for tag in ("train/loss", "valid/loss"):
        assert largest_difference(curve(run, tag), curve(one, tag)) < 1e-4

    said = login.type("submit", run, "--job=evaluate", "--site=site.yaml", "data.test=proteins.fasta").split()
    assert login.cluster.wait_for(said[said.index("job") + 1], *ENDED) == "COMPLETED"
    assert "perplexity" in (login.folder / said[said.index("log") + 1]).read_text()
    assert len(list((run / "evaluations").glob("*.json"))) == 1

    state = json.loads(login.type("status", run, "--json"))
    assert (state["state"], state["step"], state["starts"]) == ("FINISHED", 20, 1)
    assert state["loss"] == pytest.approx(curve(run, "train/loss")[20], rel=1e-4)
    assert state["tokens_per_second"] > 0


def test_a_corpus_is_prepared_by_a_job(login: Login) -> None:
    (login.folder / "corpus.yaml").write_text("sources: [proteins.fasta]\noutput: corpus\nvalid_fraction: 0.1\n")
    said = login.type("submit", "corpus.yaml", "--job=prepare", "--site=site.yaml", "test_fraction=0.1").split()
    log = login.folder / said[said.index("log") + 1]
    assert login.cluster.wait_for(said[said.index("job") + 1], *ENDED) == "COMPLETED", log.read_text()
    assert (login.folder / "corpus/manifest.json").exists(), log.read_text()
    assert "200" in login.type("data", "inspect", "corpus")


def test_a_sweep_of_four_trains_four_runs(login: Login) -> None:
    (login.folder / "sweep.txt").write_text("# learning rates\noptim.lr=0.001\noptim.lr=0.002\n\noptim.lr=0.003\n")
    rates = [0.001, 0.002, 0.003]
    dry = login.type("submit", "tiny.yaml", "run.name=s", "--array=sweep.txt", "--dry-run")
    assert "#SBATCH --array=0-2\n" in dry
    assert not (login.folder / "runs/s-0").exists()
    rates.append(0.004)
    members = [f"--array=optim.lr={rate}" for rate in rates]
    job, _ = login.submit("sweep", *members, "trainer.max_steps=5", "trainer.valid_every=0", "--at-once=2")
    runs = [login.folder / "runs" / f"sweep-{number}" for number in range(4)]
    deadline = time.monotonic() + 150
    while not all((run / "FINISHED").exists() for run in runs):
        assert time.monotonic() < deadline, login.cluster.run("squeue", "--states=all")
        time.sleep(0.5)
    losses = [curve(run, "train/loss")[5] for run in runs]
    assert len(set(losses)) == 4
    table = login.type("jobs")
    for number in range(4):
        assert re.search(rf"^sweep-{number} +{job}_{number} +(FINISHED|RUNNING|COMPLETING) +5/5 ", table, re.M), table


def test_a_chain_of_three_goes_on_from_job_to_job(login: Login) -> None:
    job, run = login.submit(
        "chain", "--chain=3", "data.batch_tokens=6144", "trainer.max_steps=60", "trainer.valid_every=0"
    )
    jobs = json.loads("[" + ",".join((run / "slurm/jobs.jsonl").read_text().splitlines()) + "]")
    ids = [entry["job"] for entry in jobs]
    assert ids == [job, str(int(job) + 1), str(int(job) + 2)]
    login.wait_for_step(run, 3)
    login.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert login.cluster.wait_for(ids[0], *ENDED) == "FAILED"  # exit code 75: the next job goes on
    assert login.cluster.wait_for(ids[1], *ENDED) == "COMPLETED"
    assert login.cluster.wait_for(ids[2], *ENDED) == "COMPLETED"
    assert list(curve(run, "train/loss")) == list(range(1, 61))
    log = login.log(run)
    assert "goes on with the chain's next job" in log
    assert "finished already" in log


def test_a_run_that_is_cancelled_saves_and_may_be_submitted_again(login: Login) -> None:
    many = ("data.batch_tokens=6144", "trainer.max_steps=5000", "trainer.valid_every=0", "trainer.checkpoint_every=0")
    job, run = login.submit("cancelled", *many)
    twice = login.type("submit", run, check=False)
    assert twice == ""  # refused: the job has the run
    at = login.wait_for_step(run, 2).step
    row = next(line for line in login.type("jobs").splitlines() if line.startswith("cancelled "))
    assert re.search(rf" {job} +RUNNING +\d+/5000 ", row), row
    assert f"cancelled job {job}." in login.type("cancel", run)
    assert login.cluster.wait_for(job, "CANCELLED") == "CANCELLED"
    deadline = time.monotonic() + 20
    while not (kept := list((run / "checkpoints").glob("step-*.ckpt"))):
        assert time.monotonic() < deadline, login.log(run)
        time.sleep(0.1)
    assert int(kept[0].name[5:13]) >= at
    time.sleep(1)
    assert login.cluster.state(job) == "CANCELLED"  # it does not come back
    assert "no job of this run runs or waits" in login.type("cancel", run)
    state = json.loads(login.type("status", run, "--json"))
    assert (state["state"], state["why"]) == ("CANCELLED", "saved")


@pytest.mark.parametrize("request_as", ["gpus-per-node", "gres"])
def test_directives_for_gpus_are_accepted(tmp_path: Path, login: Login, request_as: str) -> None:
    if missing():
        pytest.skip(missing())
    (tmp_path / "gpu.yaml").write_text(
        f"gpu_request: {request_as}\ntime: 2h\ncpus_per_task: 2\nmemory: 4G\nexclusive: true\n"
    )
    config = (login.folder / "tiny.yaml").read_text().replace("accelerator: cpu, ", "")
    (tmp_path / "tiny.yaml").write_text(config.replace("proteins.fasta", str(login.folder / "proteins.fasta")))
    with Cluster(2, gpus=2) as cluster:

        def submit(gpus: int, *words: str) -> str:
            command = (
                LONGSEQ,
                "submit",
                "tiny.yaml",
                "--site=gpu.yaml",
                "--nodes=2",
                f"--gpus-per-node={gpus}",
                *words,
            )
            return cluster.run(*command, cwd=tmp_path, check=False)

        assert "to start at" in submit(2, "--test-only", "trainer.accumulate=3")
        assert submit(3, "--test-only") == ""  # a node has 2
        assert not (tmp_path / "runs").exists()
        job = submit(2, "run.name=gpus", "trainer.accumulate=3").split()[1]
        shown = cluster.run("scontrol", "show", "job", job)
        assert "gres:gpu:2" in shown or "gpu:2" in shown
        cluster.run("scancel", job)
