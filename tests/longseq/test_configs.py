"""The configurations that come with longseq: found by name, listed, copied, and inside the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from longseq.cli import main
from longseq.config.loading import load_config
from longseq.config.shipped import located, shipped

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("configs/*/*.yaml"))


def test_every_configuration_has_its_name():
    assert shipped() == {f"{file.parent.name}/{file.stem}": file for file in FILES}


@pytest.mark.parametrize("name", ["protein/base", "protein/base.yaml", "configs/protein/base.yaml"])
def test_a_name_is_a_configuration_where_no_such_file_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name, ["data.train=x"]) == load_config(ROOT / "configs/protein/base.yaml", ["data.train=x"])


def test_a_file_of_ones_own_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "protein").mkdir(parents=True)
    (tmp_path / "configs" / "protein" / "base.yaml").write_text("data: {train: [x]}\n")
    assert located("configs/protein/base.yaml") == Path("configs/protein/base.yaml")
    assert located("protein/base") == ROOT / "configs/protein/base.yaml"
    assert located("base") == Path("base")


def test_the_list_has_every_configuration_and_profile(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sites = [f"sites/{file.stem}" for file in sorted(ROOT.glob("slurm/sites/*.yaml"))]
    assert [line.split()[0] for line in lines] == [*shipped(), *sites]
    assert "protein/base                 A protein Performer from FASTA files, for one machine" in lines


def test_a_copy_brings_what_it_extends(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "protein/uniref50_concat8k", "experiments/table2.yaml", "sites/example"]) == 0
    copied = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.yaml")}
    names = ("uniref50_concat8k", "concat8k", "base", "experiment")
    wanted = {f"configs/protein/{name}.yaml" for name in names}
    assert copied == wanted | {"configs/experiments/table2.yaml", "slurm/sites/example.yaml"}
    assert capsys.readouterr().out.split() == [
        *(f"configs/protein/{name}.yaml" for name in ("uniref50_concat8k", "concat8k", "base")),
        *("configs/experiments/table2.yaml", "configs/protein/experiment.yaml", "slurm/sites/example.yaml"),
    ]
    for name in copied:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_all_copies_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "all"]) == 0
    there = {str(file.relative_to(ROOT)) for file in (*FILES, *ROOT.glob("slurm/sites/*.yaml"))}
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.yaml")} == there


def test_a_copy_replaces_nothing_and_then_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "protein").mkdir(parents=True)
    mine = tmp_path / "configs" / "protein" / "base.yaml"
    mine.write_text("mine")
    assert main(["configs", "copy", "protein/window"]) == 1
    assert "configs/protein/base.yaml: exists, with other content; move it away" in capsys.readouterr().err
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_a_name_that_does_not_exist_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "protein/base", "protein/bass"]) == 1
    assert "protein/bass: no such configuration; `longseq configs` lists" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """longseq as its wheel has it, by the project's own build hook; from a copy, so that the checkout stays clean."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("platform", "pipelines", "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_all_files_of_the_packages_and_trains_in_an_empty_folder(unpacked, tmp_path):
    for room in ("platform", "pipelines"):
        there = (file for file in (ROOT / room).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        assert [str(file) for file in there if not (unpacked / file.relative_to(ROOT / room)).is_file()] == []

    def python(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(unpacked)}  # before the checkout that is installed here
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def longseq(*words: str) -> str:
        return python("-m", "longseq.cli", *words)

    assert python("-c", "import longseq; print(longseq.__file__)").startswith(str(unpacked))
    assert {line.split()[0] for line in longseq("configs").splitlines()} > set(shipped())
    longseq("data", "synth", "data/synthetic.fasta.gz", "--families", "4", "--records", "200", "--mean-length", "60")
    small = ("model.dim=32", "model.heads=2", "model.depth=1", "data.batch_tokens=320", "run.name=one")
    submitted = longseq("submit", "protein/quickstart", *small, "--nodes", "2", "--dry-run", "--site", "local")
    assert submitted.startswith("#!")
    assert "Finished: step 2 of 2" in longseq("fit", "protein/quickstart", "trainer.max_steps=2", *small)
