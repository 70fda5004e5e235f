"""Who has a run, and what becomes of its checkpoints, on a real SLURM cluster."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from command_line import LONGSEQ, checkpoint, checkpoints
from longseq.runs import starts

from .conftest import ENDED, Login

pytestmark = pytest.mark.distributed

LONG = ("data.batch_tokens=6144", "trainer.max_steps=5000", "trainer.valid_every=0", "trainer.checkpoint_every=5")


def content(run: Path) -> dict[str, str]:
    files = (path for path in sorted((run / "checkpoints").rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_job_keeps_its_run_and_a_run_its_checkpoints(login: Login) -> None:
    cluster = login.cluster
    job, run = login.submit("owned", "--nodes=1", *LONG)
    login.wait_for_step(run, 12)

    # While the job has it, nobody else starts it.
    for verb in ("resume", "submit"):
        refused = login.begin(verb, run, "--take-over").communicate(timeout=60)[0]
        assert f"job {job} (RUNNING) of " in refused
        assert "longseq cancel" in refused
    if os.getuid() == 0:  # another user, who may read everything but is nobody to SLURM
        other = ("--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_override")
        other = ("setpriv", *other, "--ambient-caps=+dac_override", LONGSEQ)
        state = json.loads(cluster.run(*other, "status", run, "--json", cwd=login.folder))
        assert (state["state"], state["job"]) == ("RUNNING", job)
        assert cluster.run(*other, "submit", run, "--site=site.yaml", check=False, cwd=login.folder) == ""
    assert json.loads(login.type("status", run, "--json"))["state"] == "RUNNING"
    assert starts.numbers(run / "starts") == [1]

    # It is saved, and comes back to checkpoints that its version cannot read.
    cluster.run("scontrol", "hold", job, check=False)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING")
    manifests = [checkpoint(run, step) / "manifest.json" for step in checkpoints(run)]
    texts = [manifest.read_text() for manifest in manifests]
    for manifest, text in zip(manifests, texts, strict=True):
        manifest.write_text(text.replace('"format": 2', '"format": 3'))
    before = content(run)
    assert len(checkpoints(run)) == 3
    assert f"job {job} (PENDING)" in login.begin("resume", run).communicate(timeout=60)[0]
    cluster.run("scontrol", "release", job)
    assert cluster.wait_for(job, *ENDED) == "FAILED", login.log(run)
    assert content(run) == before
    why = (run / "STOPPED").read_text()
    assert "none of its 3 checkpoints can be used" in why
    assert "format 3" in why
    assert starts.read_progress(run / "starts", 2) is None

    # One of them is damaged: `submit` goes one back and says so, as `resume` does; the precision stays.
    for manifest, text in zip(manifests, texts, strict=True):
        manifest.write_text(text)
    os.truncate(manifests[-1], 100)
    refused = login.begin("submit", run, "--site=site.yaml", "trainer.precision=bf16").communicate(timeout=60)[0]
    assert "trained with trainer.precision=fp32" in refused
    said = login.begin("submit", run, "--site=site.yaml").communicate(timeout=60)[0]
    assert f"{manifests[-1]}: not valid JSON, so it was damaged. Going back to the one before it." in said
    at = checkpoints(run)[-2]
    login.wait_for_step(run, at + 1, start=3)
    assert (checkpoint(run, checkpoints(run)[-1]).parent / f"{manifests[-1].parent.stem}.damaged").is_dir()
    assert f"step {at} of 5000" in login.log(run)
    assert "cancelled job" in login.type("cancel", run)
