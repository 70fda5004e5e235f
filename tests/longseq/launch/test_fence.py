"""Jobs that train nothing: an older start of theirs ends, and writes nothing more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longseq.config.schema import Config
from longseq.errors import EXIT_SUPERSEDED, SupersededError
from longseq.evaluation.result_files import add_points, keep_json
from longseq.launch.slurm import render
from longseq.launch.slurm.render import Request
from longseq.launch.slurm.site import Site
from longseq.output_files import output_file
from longseq.runs import starts
from longseq.runs.curves import read_curves

WORDS = "start 2 has this run now, so start 1 writes nothing more to it and ends."


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job's starts, of which this process has the first."""
    folder = tmp_path / "evaluate-7.fence"
    number = starts.take(folder, "slurm job 7")
    monkeypatch.setenv(starts.OWN, str(starts.path_of(folder, number, "start")))
    return folder


def test_an_older_start_of_a_job_keeps_no_results(own, tmp_path):
    def write(number: int) -> None:
        with output_file(tmp_path / "scores.csv") as partial:
            partial.write_text(f"{number}\n")

    writes = (
        write,
        lambda number: keep_json(number, tmp_path / "evaluations/a.json"),
        lambda number: add_points(tmp_path / "curves", {"loss": float(number)}, 3),
    )
    for attempt in writes:
        attempt(1)
    starts.take(own, "slurm job 7, restart 1")
    for attempt in writes:
        with pytest.raises(SupersededError) as refusal:
            attempt(2)
        assert str(refusal.value) == f"{own}: {WORDS}"
    assert (tmp_path / "scores.csv").read_text() == "1\n"
    assert json.loads((tmp_path / "evaluations/a.json").read_text()) == 1
    assert read_curves(tmp_path / "curves") == {"loss": {3: 1.0}}
    left = {path.name for path in tmp_path.rglob("*") if "partial" in path.name}
    assert not left


def test_what_is_no_job_writes_as_ever(own, tmp_path, monkeypatch):
    starts.take(own, "a newer one")
    monkeypatch.delenv(starts.OWN)
    keep_json(1, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_verb_of_a_job_ends_once_the_job_has_started_anew(own):
    """Any long work will do in place of an evaluation's."""
    program = (
        "import sys, time\nfrom longseq.runs import starts\nstarts.POLL_SECONDS = 0.1\n"
        "from longseq import cli\ncli._run = lambda argv, begin: print('works', flush=True) or time.sleep(600)\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", program, "evaluate", "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as verb:
        try:
            assert verb.stdout is not None
            assert verb.stdout.readline() == "works\n"
            starts.take(own, "slurm job 7, restart 1")
            assert verb.wait(60) == EXIT_SUPERSEDED
            assert verb.stderr is not None
            assert verb.stderr.read() == f"longseq: error: {own}: {WORDS}\n"
        finally:
            verb.kill()


def script(folder: Path, tools: Path, *, restart: int = 0) -> tuple[str, str]:
    """What the script of an evaluation says and hands its step, with stand-ins for SLURM's commands."""
    text = render.evaluate_script(folder, [], Site(), Request(1, 1, gpus=False, code="3f2a9c01b7d4"))
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    environment["SLURM_RESTART_COUNT"] = str(restart)
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr, (tools / "handed").read_text() if (tools / "handed").exists() else ""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    bodies = {"srun": f'echo "$PYTHONPATH $LONGSEQ_START" >"{folder}/handed"', "sleep": f'. "{folder}/meanwhile"'}
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "meanwhile").touch()
    return folder


def test_each_start_of_a_jobs_script_has_the_next_number_and_the_submitted_code(tmp_path, tools):
    run = tmp_path / "a run"
    code = run / "code/3f2a9c01b7d4"
    (run / "slurm").mkdir(parents=True)
    said, handed = script(run, tools)
    assert "the code of this run is not there" in said
    assert not handed
    (code / "longseq").mkdir(parents=True)
    (code / "longseq/cli.py").touch()
    said, handed = script(run, tools, restart=1)
    place = run / "slurm/evaluate-7.fence"
    assert handed == f"{code} {place}/00002.start\n"
    assert (place / "00002.start").read_text() == "slurm job 7, restart 1, on n1\n"
    assert "longseq: code 3f2a9c01b7d4, as it was submitted" in said


def test_a_place_that_cannot_be_written_is_tried_again_and_said_once(tmp_path, tools):
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    blocked = run / "slurm/evaluate-7.fence"
    blocked.touch()
    said, _ = script(run, tools)
    assert said.count("no start can be noted there (Not a directory): tried again for ten minutes") == 1
    assert "no start can be noted there (Not a directory). What was saved is still there" in said
    (tools / "meanwhile").write_text(f'rm -f "{blocked}"\n')
    said, _ = script(run, tools)
    assert "longseq: start 00001 of evaluate: slurm job 7, restart 0, on n1" in said
    assert os.listdir(blocked) == ["00001.start"]  # noqa: PTH208


def test_a_signal_while_no_start_can_be_noted_sends_the_job_back(tmp_path, tools):
    """The time limit comes while the disk is full: SLURM needs none to let it come back."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "starts").touch()
    (tools / "meanwhile").write_text('kill -USR1 "$PPID"\n')
    for name, body in {"scontrol": f'echo "$*" >>"{tools}/asked"', "squeue": "echo RUNNING", "sinfo": ""}.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    config = Config()
    config.data.length, config.data.batch_tokens = 64, 64
    text = render.train_script(run, config, Site(), Request(1, 1, gpus=False))
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "requeue 7" in (tools / "asked").read_text()
    assert done.stdout.count("no start can be noted") == 1
