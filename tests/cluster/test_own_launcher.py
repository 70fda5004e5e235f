"""`python -m longseq.launch.rank` by srun itself: typed on a login node, and in somebody's own job script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import checkpoint, curve
from longseq.runs import starts

from .conftest import ENDED, Login

pytestmark = pytest.mark.distributed

RANK = (sys.executable, "-m", "longseq.launch.rank")
KEYS = ("trainer.zero_stage=1", "trainer.valid_every=0")


def test_srun_starts_a_training_on_two_nodes_and_a_job_of_ones_own_goes_on_with_it(
    login: Login, here: Callable[..., Path]
) -> None:
    cluster, run = login.cluster, login.folder / "runs/srun"
    typed = ("srun", "--nodes=2", "--ntasks=2", "--export=ALL,OMP_NUM_THREADS=1", *RANK)
    words = ("fit", "tiny.yaml", f"run.name={run.name}", *KEYS)
    cluster.run(*typed, *words, cwd=login.folder, timeout=300)
    assert starts.read_end(run / "starts", 1) == "finished"

    script = login.folder / "own.sbatch"
    again = (*RANK, "resume", run, "trainer.max_steps=30")
    script.write_text("#!/bin/bash\nsrun --ntasks=2 " + " ".join(f"'{word}'" for word in again) + "\n")
    options = ("--parsable", "--nodes=2", "--ntasks=2", "--export=ALL,OMP_NUM_THREADS=1", f"--output={script}.log")
    job = cluster.run("sbatch", *options, script, cwd=login.folder).strip()
    assert cluster.wait_for(job, *ENDED) == "COMPLETED", Path(f"{script}.log").read_text()
    assert starts.read_end(run / "starts", 2) == "finished"

    one = here("one-machine", "trainer.devices=2", "trainer.max_steps=30", *KEYS)
    assert curve(run, "train/loss") == curve(one, "train/loss")
    weights = [(checkpoint(each, 30) / "model.safetensors").read_bytes() for each in (run, one)]
    assert weights[0] == weights[1]
