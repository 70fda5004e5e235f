"""The code of a run: what was submitted is what runs, whatever becomes of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import longseq
import longseq_data
from longseq.errors import RunError
from longseq.runs import code
from longseq.runs.run import Run

WHICH = "import longseq, longseq_data; print(longseq.__file__); print(longseq_data.__file__)"
NOTED = "from longseq.runs import code; print(code.current(), code.git_commit(), code.changed_packages())"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the packages, that tests may edit."""
    folder = tmp_path / "checkout"
    for package in (longseq, longseq_data):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def submitted(tmp_path: Path) -> Run:
    folder = tmp_path / "run with spaces"
    folder.mkdir()
    (folder / "config.yaml").touch()
    return Run(folder)


def python(*words: object, first: Path, check: bool = True) -> str:
    """What another interpreter prints that finds ``first`` first."""
    environment = {**os.environ, "PYTHONPATH": str(first), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, check=check, capture_output=True, text=True).stdout


def keep(run: Run, checkout: Path) -> str:
    """As `longseq submit` does from a checkout; gives the snapshot's name."""
    python(
        "-c", f"from longseq.runs import code, run; code.keep(run.Run(code.Path({str(run.path)!r})))", first=checkout
    )
    return code.kept(run)


def test_a_kept_code_runs_though_the_checkout_has_changed(checkout, submitted):
    name = keep(submitted, checkout)
    (checkout / "longseq" / "errors.py").write_text("this is no Python")
    folder = code.folder_of(submitted, name)
    files = python("-c", WHICH, first=folder).splitlines()
    assert [Path(file).parents[1] for file in files] == [folder] * 2
    python("-c", "import longseq.launch.slurm.task", first=folder)
    with pytest.raises(subprocess.CalledProcessError):
        python("-c", "import longseq.launch.slurm.task", first=checkout)


def test_the_name_is_a_hash_of_both_packages(checkout, submitted):
    first = keep(submitted, checkout)
    assert first == code.current()  # the copy is equal to what this process runs
    (checkout / "longseq_data" / "errors.py").open("a").write("\n# another word\n")
    second = keep(submitted, checkout)
    assert second != first
    assert code.kept(submitted) == second
    assert sorted(path.name for path in (submitted.path / "code").iterdir()) == sorted([first, second, "used"])


def test_a_snapshot_knows_its_commit_and_what_was_installed(checkout, submitted):
    folder = code.folder_of(submitted, keep(submitted, checkout))
    facts = json.loads((folder / "snapshot.json").read_text())
    assert facts["packages"]["numpy"] == version("numpy")
    assert "longseq" not in facts["packages"]
    facts["packages"]["numpy"], facts["git_commit"] = "1.0.0", "cafe"
    (folder / "snapshot.json").write_text(json.dumps(facts))
    said = python("-c", NOTED, first=folder).strip()
    assert said == f"{folder.name} cafe ['numpy 1.0.0 → {version('numpy')}']"


def test_a_copy_whose_name_cannot_be_read_is_not_taken_for_none(submitted):
    (submitted.path / "code" / "used").mkdir(parents=True)
    with pytest.raises(RunError, match=r"cannot be read: .*directory"):
        code.kept(submitted)


def test_a_run_without_a_copy_has_none(submitted, tmp_path):
    assert code.kept(submitted) == ""
    (submitted.path / "code").mkdir()
    (submitted.path / "code" / "used").write_text("0123456789ab\n")  # and the folder is away
    assert code.kept(submitted) == ""


def test_a_copy_that_cannot_be_written_is_one_sentence(submitted):
    (submitted.path / "code").write_text("a file")
    with pytest.raises(RunError, match="the code of the run cannot be kept"):
        code.keep(submitted)


def test_a_file_that_changes_while_it_is_copied_keeps_no_code(submitted, monkeypatch):
    """No node would run a copy whose content is not what its name says."""
    code.current()
    name = code._hash

    def edited(packages):
        (first, *others) = packages
        (first / "__init__.py").write_text("# edited\n")
        return name([first, *others])

    monkeypatch.setattr(code, "_hash", edited)
    with pytest.raises(RunError, match="a file was changed while the code was copied from there: try again"):
        code.keep(submitted)
    assert list((submitted.path / "code").iterdir()) == []


def test_resume_begins_anew_with_the_kept_code_or_takes_todays(checkout, submitted):
    """The kept code's own `resume` says that it is the one that runs."""
    resume = checkout / "longseq" / "commands" / "resume.py"
    text = resume.read_text()
    resume.write_text(
        text.replace(
            "    training = resume(",
            "    return print('the submitted code', file=sys.stderr) or 0\n    training = resume(",
        )
    )
    name = keep(submitted, checkout)
    resume.write_text(
        text.replace(
            "    training = resume(", "    return print('today', file=sys.stderr) or 0\n    training = resume("
        )
    )

    def resumed(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-m", "longseq.cli", "resume", str(submitted.path), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    said = resumed()
    assert said.startswith(f"code     {name}, of the submission (--current-code takes today's, ")
    assert said.endswith("the submitted code\n")
    said = resumed("--current-code")
    assert f", today's; that of the submission was {name}\n" in said
    assert said.endswith("today\n")
    assert code.kept(submitted) != name
    assert resumed() == "today\n"


def test_of_two_submissions_at_once_both_have_the_code(tmp_path, monkeypatch):
    folder, copytree = tmp_path / "code", code.shutil.copytree

    def overtaken(*arguments):
        copytree(*arguments)
        (folder / code.current() / "longseq").mkdir(parents=True, exist_ok=True)

    left = folder / ".killed"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    monkeypatch.setattr(code.shutil, "copytree", overtaken)
    code.keep_in(folder)
    assert [path.name for path in folder.iterdir()] == [code.current()]


def test_a_node_that_would_run_other_code_than_the_jobs_is_refused(tmp_path, monkeypatch, checkout, submitted):
    snapshot = code.folder_of(submitted, keep(submitted, checkout))
    monkeypatch.setenv(code.TOLD, str(snapshot))
    asks = ("-c", "from longseq.runs import code; print(code.other_than_told())")
    assert python(*asks, first=snapshot) == "\n"
    (snapshot / "longseq/errors.py").open("a").write("\n")
    words = "is not as it was submitted: a file of it was changed, or does not come whole to this node."
    assert python(*asks, first=snapshot) == f"{snapshot} {words}\n"
    monkeypatch.setenv(code.TOLD, str(tmp_path))
    with pytest.raises(RunError, match=rf"^{socket.gethostname()}: the job's code is {tmp_path}, and .* would run"):
        code.check_told()
