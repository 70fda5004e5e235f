"""`longseq logs` shows what was written, whatever lies at the end of a block of bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longseq.cli import main
from longseq.commands import status
from longseq.commands.logs import log_of
from longseq.config.loading import load_config
from longseq.launch.slurm.queue import SlurmError
from longseq.launch.slurm.state import SharedJob, record_job, record_shared
from longseq.runs.run import Run

LETTERS = {"é": 2, "→": 3, "𝛚": 4}


@pytest.fixture
def run(folder: Path) -> Run:
    run = Run.create(load_config(folder / "small.yaml", ["data.train=a.fasta", "run.name=one"]), "x")
    run.slurm_dir.mkdir()
    return run


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_letter_on_both_sides_of_a_block_is_whole(run, capsys, letter, before):
    text = "a" * (65536 - before) + letter + "b" * 65530 + letter * 3 + "\n"
    (run.slurm_dir / "job-1.log").write_text(text, encoding="utf-8")
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == text


def test_bytes_that_are_no_text_are_shown_as_such(run, capsys):
    (run.slurm_dir / "job-1.log").write_bytes(b"a\xffb\xe2\x86")
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out == "a\ufffdb\ufffd"


def test_a_letter_that_is_half_written_is_waited_for(run):
    log = run.slurm_dir / "job-1.log"
    log.write_bytes("x →".encode()[:-1])
    command = [sys.executable, "-m", "longseq.cli", "logs", "-f", str(run.path)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert follower.stdout is not None
    assert os.read(follower.stdout.fileno(), 100) == b"x "
    with log.open("ab") as file:
        file.write("→".encode()[-1:] + b"\n")
    time.sleep(0.1)
    (run.path / "FINISHED").write_text("1\n")
    rest, _ = follower.communicate(timeout=120)
    assert rest == "→\n".encode()
    assert follower.returncode == 0


def test_the_last_words_of_a_jobs_script_are_waited_for(run, capsys, monkeypatch, tmp_path):
    """The training has written FINISHED; the script says so later, here when it is asked for the second time."""
    log, asked = run.slurm_dir / "job-7.log", tmp_path / "asked"
    log.write_text("step 4/4\n")
    record_job(run, "7", "submit")
    (run.path / "FINISHED").write_text("4\n")
    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"""#!/bin/bash
echo >>"{asked}"
if [ "$(wc -l <"{asked}")" = 1 ]; then state=RUNNING; else state=COMPLETED; echo "finished: it" >>"{log}"; fi
echo "7|$state|None|1:00|n1|now|me|7|"
"""
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["logs", "-f", str(run.path)]) == 0
    assert capsys.readouterr().out == "step 4/4\nfinished: it\n"


def test_of_two_jobs_that_run_the_newer_ones_log_is_shown_whichever_wrote_last(run):
    for job, when in (("12", 200), ("9", 100), ("11", 300)):  # as they were submitted; 11 is another verb's
        record_shared(run, SharedJob(job, "score" if job == "11" else "embed", "place", "longseq submit", "script"))
        (run.slurm_dir / f"embed-{job}.log").touch()
        os.utime(run.slurm_dir / f"embed-{job}.log", (when, when))
    assert log_of(run, 0, "embed") == run.slurm_dir / "embed-9.log"
    (run.slurm_dir / "embed-9.log").unlink()  # it waits
    assert log_of(run, 0, "embed") == run.slurm_dir / "embed-12.log"
    assert log_of(run, 0, "benchmark") is None


@pytest.mark.parametrize("answers", [True, False])
def test_a_job_that_slurm_has_forgotten_has_ended(run, monkeypatch, answers):
    def queue(jobs):
        if not answers:
            raise SlurmError("squeue: Unable to contact slurm controller")
        return {}

    record_shared(run, SharedJob("12", "embed", str(run.path / "none"), "longseq submit", "script"))
    monkeypatch.setattr(status, "queue", queue)
    (line,) = status.shared(run)
    assert line.startswith(f"embed     job 12: {'ENDED' if answers else 'UNKNOWN'}; ")
