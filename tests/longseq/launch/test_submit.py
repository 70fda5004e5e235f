"""`longseq submit` up to sbatch, which is not needed here, and what the other verbs say without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import longseq as api
from longseq.config.loading import load_config
from longseq.errors import LongseqError
from longseq.launch import local
from longseq.launch.slurm.queue import Queued
from longseq.launch.slurm.state import jobs_of, record_job, state_of
from longseq.runs import code, starts
from longseq.runs.run import Run
from longseq.runs.starts import Progress

HEAVY = {"torch", "lightning", "deepspeed", "tensorboard", "datasets"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "proteins.fasta").write_text(
        "".join(f">r{i}\n{'MKVLAACDEFGHIKLMNP'[i % 7 :]}{'QRSTVW'[i // 7]}\n" for i in range(40))
    )
    text = "model: {preset: tiny}\ndata: {train: proteins.fasta, length: 16, batch_tokens: 64}\n"
    (tmp_path / "small.yaml").write_text(f"{text}trainer: {{max_steps: 8, accelerator: cpu}}\n")
    (tmp_path / "tools").mkdir()
    return tmp_path


def longseq(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, with the stand-ins in tools/ instead of SLURM; the packages it has imported are on stderr's end."""
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('\\n', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        "from longseq.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    env = {**os.environ, "PATH": f"{place / 'tools'}:/nowhere", "LONGSEQ_SITE": ""}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=60)


def a_run(place: Path) -> Run:
    given = [f"data.train={place}/proteins.fasta", f"run.dir={place}/runs", "run.name=one"]
    return Run.create(load_config(place / "small.yaml", given), "x")


def tool(place: Path, name: str, body: str) -> None:
    (place / "tools" / name).write_text(f"#!{sys.executable} -S\nimport sys\n{body}\n")
    (place / "tools" / name).chmod(0o755)


def test_a_dry_run_shows_the_script_makes_nothing_and_imports_no_torch(place):
    done = longseq(place, "submit", "small.yaml", "--nodes=2", "--gpus-per-node=2", "run.name=new", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=new\n#SBATCH --nodes=2\n")
    assert f"run={place}/runs/new\n" in done.stdout
    assert "gpus" not in done.stdout  # trainer.accelerator=cpu
    assert not (place / "runs").exists()
    assert HEAVY.isdisjoint(done.stderr.split())


def test_a_program_gets_the_scripts_that_would_be_submitted_as_data(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("LONGSEQ_SITE", raising=False)
    sweep = [["optim.lr=0.1"], ["optim.lr=0.2"], ["optim.lr=0.3"]]
    found = api.submit("small.yaml", ["run.name=new"], nodes=2, array=sweep, at_once=2, dry_run=True)
    assert found.script.startswith("#!/bin/bash\n#SBATCH --job-name=new\n#SBATCH --nodes=2\n")
    assert "#SBATCH --array=0-2%2\n" in found.script
    assert ([run.path.name for run in found.runs], found.jobs) == (["new-0", "new-1", "new-2"], ())
    assert not (place / "runs").exists()
    with pytest.raises(LongseqError, match="min-nodes=3 is more than"):
        api.submit("small.yaml", nodes=2, min_nodes=3)
    with pytest.raises(LongseqError, match=r"run\.name and run\.dir are one for all"):
        api.submit("small.yaml", array=[["run.name=a"]])


def test_a_job_is_submitted_confirmed_and_noted(place):
    tool(place, "sbatch", "print('12')")
    tool(place, "squeue", "print('12|PENDING|Resources|1:00:00||N/A')")
    done = longseq(place, "submit", "small.yaml", "run.name=new")
    assert done.returncode == 0, done.stderr
    for text in ("job     12\n", "run     runs/new\n", "longseq logs -f runs/new", "longseq cancel runs/new"):
        assert text in done.stdout
    run = Run.open(place / "runs/new")
    assert (run.slurm_dir / "train-12.sbatch").read_text().startswith("#!/bin/bash")
    assert load_config(run.config_path).trainer.nodes == 1
    assert HEAVY.isdisjoint(done.stderr.split())
    table = longseq(place, "jobs").stdout
    assert "PENDING" in table
    assert "Resources" in table
    again = longseq(place, "submit", "runs/new")
    assert again.returncode == 1
    assert "job 12 (PENDING) has this run" in again.stderr


def test_a_run_goes_on_with_the_code_of_its_submission_or_with_todays(place):
    tool(place, "sbatch", "print('12')")
    tool(place, "squeue", "print('12|COMPLETED|None|0:00||N/A')")
    today = code.current()
    done = longseq(place, "submit", "small.yaml", "run.name=new")
    assert f"code    {today}\n" in done.stdout, done.stderr
    run = Run.open(place / "runs/new")
    script = run.slurm_dir / "train-12.sbatch"
    assert f"\ncode=$run/code/{today}\n" in script.read_text()
    assert f"code      {today}\n" in longseq(place, "status", "runs/new").stdout
    # As if it had been submitted with other code.
    code.folder_of(run, today).rename(code.folder_of(run, "0123456789ab"))
    (run.path / "code" / "used").write_text("0123456789ab\n")
    done = longseq(place, "submit", "runs/new")
    assert "code    0123456789ab, of the first submission (--current-code takes today's)\n" in done.stdout, done.stderr
    assert "\ncode=$run/code/0123456789ab\n" in script.read_text()
    done = longseq(place, "submit", "runs/new", "--current-code")
    assert f"code    {today}\n" in done.stdout, done.stderr
    assert f"\ncode=$run/code/{today}\n" in script.read_text()
    assert (code.folder_of(run, today) / "longseq" / "cli.py").is_file()


def test_a_job_that_sbatch_refuses_leaves_no_run(place):
    tool(place, "sbatch", "print('sbatch: error: invalid partition', file=sys.stderr); sys.exit(1)")
    done = longseq(place, "submit", "small.yaml", "run.name=new")
    assert done.returncode == 1
    assert "longseq: error: sbatch: error: invalid partition." in done.stderr
    assert list((place / "runs").iterdir()) == []


def test_half_a_line_of_a_full_disk_is_passed_over_and_ended(place):
    run = a_run(place)
    record_job(run, "7", "longseq submit", "/a.sbatch")
    notes = run.slurm_dir / "jobs.jsonl"
    notes.write_text(notes.read_text() + '{"job": "8", "ti')
    assert jobs_of(run) == {"7": "/a.sbatch"}
    record_job(run, "9", "longseq submit", "/b.sbatch")
    assert jobs_of(run) == {"7": "/a.sbatch", "9": "/b.sbatch"}


def test_a_job_that_cannot_be_noted_is_cancelled(place):
    run = a_run(place)
    notes = run.slurm_dir / "jobs.jsonl"
    tool(place, "sbatch", f"import os; os.mkdir({str(notes)!r}); print('12')")  # from now on nothing can be noted
    tool(place, "squeue", "print('12|PENDING|Resources|1:00:00||N/A')")
    tool(place, "scancel", f"open({str(place / 'cancelled')!r}, 'w').write(' '.join(sys.argv[1:]))")
    done = longseq(place, "submit", str(run.path))
    assert done.returncode == 1
    assert "jobs.jsonl" in done.stderr
    assert (place / "cancelled").read_text().split()[-1] == "12"


def test_a_job_that_squeue_does_not_know_is_not_believed(place, monkeypatch):
    from longseq.launch.slurm import queue

    tool(place, "sbatch", "print('12')")
    tool(place, "squeue", "print('11|RUNNING|None|1:00:00|n1|N/A')")
    monkeypatch.setenv("PATH", str(place / "tools"))
    monkeypatch.setattr(queue, "_CONFIRM_SECONDS", 0.5)
    (place / "x.sbatch").write_text("#!/bin/bash\n")
    with pytest.raises(queue.SlurmError, match="sbatch gave job 12, but squeue does not know it"):
        queue.submit(place / "x.sbatch")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["small.yaml", "--nodes=3"], "4 sequences, which 3 processes (trainer.nodes × trainer.devices)"),
        (["small.yaml", "--nodes=2", "--min-nodes=3"], "--min-nodes=3 is more than --nodes=2"),
        (["small.yaml", "--job=prepare", "--spares=1"], "--spares=1: only a training has spares; leave it out with"),
        (["small.yaml", "data.train=none.fasta"], "none.fasta"),
        (["small.yaml", "run.name=a;rm -rf ~"], "a run is named with letters"),
        (["small.yaml", "run.name=a\nb"], "a run is named with letters"),
        (["small.yaml", "run.dir=a\nb", "run.name=x"], "leave it out"),
        (["small.yaml", "--site=nowhere.yaml"], "site nowhere.yaml: no such file"),
        (["small.yaml", "--array=none.txt"], "--array=none.txt: no such file, and no key=value"),
        (["small.yaml", "--array=optim.l=1"], "unknown key 'optim.l'"),
        (["small.yaml", "--chain=2", "--array=optim.lr=1"], "leave --chain out"),
        (["small.yaml", "trainer.nodes=0"], "'trainer.nodes=0' must be at least 1"),
        (["small.yaml"], "sbatch: not found: this is no machine of a SLURM cluster"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(place, arguments, sentence):
    done = longseq(place, "submit", *arguments)
    assert done.returncode == 1, done.stdout
    assert sentence in done.stderr
    assert not list(place.glob("runs/*"))


SHARED = ["runs/one", "--dependency=afterok:3", "--nodes=2"]  # of a training that still runs


def test_a_job_that_embeds_is_submitted_noted_and_refused_a_second_time(place):
    run = a_run(place)
    tool(place, "sbatch", "print('12')")
    tool(place, "squeue", "print('12|PENDING|Resources|1:00:00||N/A')")
    words = ["submit", *SHARED, "--job=embed", "--", "proteins.fasta", "--out", "v.npz", "--layer", "1"]
    done = longseq(place, *words)
    assert done.returncode == 0, done.stderr
    assert "log     runs/one/slurm/embed-12.log\n" in done.stdout
    assert "longseq logs -f runs/one --job embed\n" in done.stdout
    assert "Cancel it:     scancel 12 " in done.stdout
    assert HEAVY.isdisjoint(done.stderr.split())
    script = (run.slurm_dir / "embed-12.sbatch").read_text()
    assert f"\nshards={place}/.v.npz.shards\n" in script
    hash_ = code.current()
    assert f"\ncode={run.path}/code/{hash_}\n" in script
    assert (run.path / "code" / hash_ / "longseq/cli.py").exists()
    assert f" 1 embed {run.path} proteins.fasta --out v.npz --layer 1 &\n" in script
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --dependency=afterok:3\n" in script
    again = longseq(place, *words)
    assert again.returncode == 1
    assert "v.npz.shards: job 12 (PENDING) writes there. Follow it (`longseq logs" in again.stderr
    assert "cancel it first (`scancel 12`: what is finished stays)" in again.stderr
    assert jobs_of(run) == {}  # a training may have the run meanwhile
    (place / ".v.npz.shards").mkdir()
    (place / ".v.npz.shards" / "a.shard").touch()
    assert "embed     job 12: PENDING; 1 shards are finished; " in longseq(place, "status", "runs/one").stdout
    (run.slurm_dir / "embed-12.log").write_text("so far\n")
    assert longseq(place, "logs", "runs/one", "--job=embed").stdout == "so far\n"
    assert "no job has written a log yet that scores" in longseq(place, "logs", "runs/one", "--job=score").stderr
    tool(place, "scancel", "")
    assert "cancelled job 12" in longseq(place, "cancel", "runs/one", "--job=embed").stdout
    assert "no job of this run" in longseq(place, "cancel", "runs/one").stdout


def test_a_benchmark_names_its_model_behind_its_file(place):
    run = a_run(place)
    (place / "gym").mkdir()
    words = ["submit", *SHARED, "--job=benchmark", "--dry-run", "--", "proteingym", "gym", "--assay", "a b"]
    script = longseq(place, *words).stdout
    assert f" benchmark proteingym gym {run.path} --assay 'a b' &\n" in script
    other = longseq(place, *words[:-1], "c").stdout
    places = [next(line for line in text.splitlines() if line.startswith("shards=")) for text in (script, other)]
    assert places[0].startswith(f"shards={run.slurm_dir}/benchmark-")
    assert places[0] != places[1]
    assert not run.slurm_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--job=score", "--", "proteins.fasta"], "--job=score: its results need a file: add --out FILE"),
        (["--job=score", "--", "proteins.fasta", "--out=no/s.tsv"], "no/s.tsv: the folder "),
        (["--job=embed", "--", "none.fasta", "--out=v.npz"], "none.fasta does not exist: correct the path"),
        (["--job=embed"], "--job=embed: name the file first, behind `--`: `longseq submit RUN --job embed -- "),
        (["--job=benchmark", "--", "proteingym", "--assay=a", "gym"], "the benchmark's name and file first"),
        (["--job=embed", "--", "proteins.fasta", "--out=v.npz", "--devices=2"], "--gpus-per-node, before the `--`"),
        (["--job=score", "--chain=2", "--", "proteins.fasta", "--out=v"], "are for trainings; leave them out"),
    ],
)
def test_what_no_job_could_do_is_refused_before_it_waits(place, arguments, sentence):
    run = a_run(place)
    done = longseq(place, "submit", *SHARED, *arguments)
    assert done.returncode == 1, done.stdout
    assert sentence in done.stderr
    assert not run.slurm_dir.exists()
    assert longseq(place, "submit", *SHARED, "--job=embed", "--", "proteins.fasta", "--layers").returncode == 2


def test_a_run_without_a_checkpoint_has_nothing_to_embed_with(place):
    a_run(place)
    done = longseq(place, "submit", "runs/one", "--job=embed", "--", "proteins.fasta", "--out=v.npz")
    assert "there is no checkpoint yet" in done.stderr


def test_without_slurm_the_folders_still_speak(place):
    run = a_run(place)
    record_job(run, "12", "longseq submit small.yaml")
    start = run.begin("slurm job 12, restart 0, on node1").start
    starts.note_progress(run.starts_dir, start, Progress(5, 8, 2.5, 1234.0, time.time()))
    done = longseq(place, "jobs")
    assert done.returncode == 0
    assert "squeue: not found" in done.stderr
    assert "one" in done.stdout
    assert "UNKNOWN" in done.stdout
    assert [word for word in done.stdout.split() if word in ("5/8", "2.5000", "1,234")] == ["5/8", "2.5000", "1,234"]
    (run.path / "FINISHED").write_text("8\n")
    shown = json.loads(longseq(place, "status", "runs/one", "--json").stdout)
    assert (shown["state"], shown["step"], shown["loss"]) == ("FINISHED", 5, 2.5)
    assert state_of(run, {}).word == "FINISHED"
    refused = longseq(place, "cancel", "runs/one")
    assert refused.returncode == 1
    assert "this is no machine of a SLURM cluster" in refused.stderr


def test_the_last_lines_of_a_log_and_those_of_a_rank(place):
    run = a_run(place)
    run.slurm_dir.mkdir()
    run.logs_dir.mkdir()
    (run.slurm_dir / "job-12.log").write_text("".join(f"line {number}\n" for number in range(20_000)))
    (run.logs_dir / "rank-1.log").write_text("of rank 1\n")
    assert longseq(place, "logs", "runs/one", "-n", "2").stdout == "line 19998\nline 19999\n"
    assert longseq(place, "logs", "runs/one", "--rank=1").stdout == "of rank 1\n"
    missing = longseq(place, "logs", "runs/one", "--rank=2")
    assert "rank 2 has no log" in missing.stderr


def test_a_run_of_several_nodes_is_not_started_on_this_machine_alone(place):
    given = [f"data.train={place}/proteins.fasta", f"run.dir={place}/runs", "run.name=two", "trainer.nodes=2"]
    run = Run.create(load_config(place / "small.yaml", given), "x")
    with pytest.raises(LongseqError, match=r"trainer\.nodes=2: .* set trainer\.nodes=1 trainer\.devices=2, or fewer"):
        local.train(run, 1, None)


def test_a_job_that_asks_for_no_gpu_is_refused_where_it_would_train_on_cpus_unsaid(place):
    auto = (place / "small.yaml").read_text().replace(", accelerator: cpu", "")
    (place / "auto.yaml").write_text(auto)
    refused = longseq(place, "submit", "auto.yaml", "--nodes=2", "--dry-run")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "trainer.accelerator=auto, but the job asks for no GPU" in refused.stderr
    for words in (["--gpus-per-node=2"], ["trainer.accelerator=cpu"], ["trainer.accelerator=cuda"]):
        shown = longseq(place, "submit", "auto.yaml", "--nodes=2", "--dry-run", *words)
        assert shown.returncode == 0, shown.stderr
        assert ("--gpus-per-node=2" in shown.stdout) == (words == ["--gpus-per-node=2"])
    # A GPU that was asked for and is not seen is no reason to train on a CPU.
    assert "trainer.accelerator=cuda" in longseq(place, "submit", "auto.yaml", "--gpus-per-node=2", "--dry-run").stdout


def test_a_time_without_its_unit_is_refused(place):
    refused = longseq(place, "submit", "small.yaml", "--time=1440", "--dry-run")
    assert refused.returncode == 1
    assert "time=1440: a number alone may mean minutes, as SLURM reads it" in refused.stderr
    assert "#SBATCH --time=1-00:00:00\n" in longseq(place, "submit", "small.yaml", "--time=1-0", "--dry-run").stdout


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("lost node2: task 1: Killed", "node2: task 1: Killed"),
        ("crashed rank 0 on node1: ValueError: a bug", "rank 0 on node1: ValueError: a bug"),
        ("preflight node1: no room.", "node1: no room."),
        ("", "NonZeroExitCode"),
    ],
)
def test_a_failed_run_shows_its_reason(place, end, why):
    run = a_run(place)
    record_job(run, "7", "longseq submit")
    start = starts.take(run.starts_dir, "slurm job 7, restart 0, on n1, from no checkpoint")
    if end:
        starts.note_end(run.starts_dir, start, end)
    ended = Queued("7", "FAILED", "NonZeroExitCode", "0:00", "n1", "N/A")
    state = state_of(run, {"7": ended})
    assert (state.word, state.why) == ("FAILED", why)


def test_a_running_job_shows_the_rank_that_does_not_answer(place):
    run = a_run(place)
    record_job(run, "7", "longseq submit")
    start = starts.take(run.starts_dir, "slurm job 7, restart 0, on n1, from no checkpoint")
    running = {"7": Queued("7", "RUNNING", "None", "1:00", "n1", "N/A")}
    assert state_of(run, running).why == ""
    starts.path_of(run.starts_dir, start, "silent").write_text("n1: rank 1 has not answered for 30 s\n")
    assert state_of(run, running).why == "n1: rank 1 has not answered for 30 s"


def test_where_squeue_does_not_answer_a_job_may_still_have_its_run(place):
    run = a_run(place)
    record_job(run, "12", "longseq submit small.yaml")
    refused = longseq(place, "resume", "runs/one")
    assert refused.returncode == 1
    assert "SLURM cannot be asked whether job 12 still has this run (squeue: not found" in refused.stderr
    assert "add --take-over" in refused.stderr
    tool(place, "squeue", "sys.exit('slurm_load_jobs error: Unable to contact slurm controller')")
    assert "Unable to contact slurm controller" in longseq(place, "resume", "runs/one").stderr
    assert json.loads(longseq(place, "status", "runs/one", "--json").stdout)["state"] == "UNKNOWN"
    assert not (run.path / "starts").exists()


def test_jobs_are_asked_for_by_their_ids_whoever_submitted_them(place):
    run = a_run(place)
    record_job(run, "12_3", "longseq submit small.yaml", run.slurm_dir / ".train.sbatch")
    asked = "open('asked', 'a').write(' '.join(sys.argv) + chr(10))"
    line = f"12_3|RUNNING|None|1:00:00|n1|2026-01-01T00:00:00|anna|15|{run.slurm_dir}/.train.sbatch"
    tool(place, "squeue", f"{asked}\nprint({line!r})")
    refused = longseq(place, "resume", "runs/one", "--take-over")
    assert refused.returncode == 1
    assert "job 12_3 (RUNNING) of anna on n1, since 2026-01-01T00:00:00 has this run" in refused.stderr
    assert "longseq cancel runs/one" in refused.stderr
    assert "--jobs=12 " in (place / "asked").read_text()
    assert "--me" not in (place / "asked").read_text()


def test_a_number_that_another_cluster_gave_to_another_job_is_no_job_of_the_run(place):
    run = a_run(place)
    record_job(run, "12", "longseq submit small.yaml", run.slurm_dir / ".train.sbatch")
    tool(place, "squeue", "print('12|RUNNING|None|1:00:00|n1|2026-01-01T00:00:00|bob|12|/home/bob/other.sh')")
    tool(place, "scancel", "open('cancelled', 'w').close()")
    assert "no job of this run runs or waits" in longseq(place, "cancel", "runs/one").stdout
    assert not (place / "cancelled").exists()
    assert json.loads(longseq(place, "status", "runs/one", "--json").stdout)["state"] == "ENDED"
