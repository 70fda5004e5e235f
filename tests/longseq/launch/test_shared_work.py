"""What the words of a shared job mean before it is submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longseq.errors import ConfigError, RunError
from longseq.launch.shared_work import check_writable, place_of
from longseq.launch.slurm.mounts import check_files
from longseq.launch.slurm.site import Site
from longseq.runs.run import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("runs/one", "d", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "data/a.fasta").touch()
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path / "runs/one")


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "d/v.npz"],
        ["--out=no.npz", "--out", "d/v.npz"],
        ["--out", "no.npz", "--out=d/v.npz"],
        ["--out=d/../d/v.npz"],
        ["--out=link/v.npz"],
    ],
)
def test_an_output_has_one_place_by_any_path(run: Run, words: list[str]) -> None:
    assert place_of(run, "embed", ["a.fasta", *words]) == Path.cwd() / "d/.v.npz.shards"


def test_a_run_that_cannot_be_written_to_is_refused_with_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(run)
    run.slurm_dir.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != run.slurm_dir)
    with pytest.raises(RunError, match=r"one/slurm: cannot be written to, .*submit a copy of the run"):
        check_writable(run)


def test_files_outside_of_a_container_are_refused_before_the_job_waits(run: Run) -> None:
    site = Site(container="apptainer", container_image="i.sif", container_mounts=["/mounted"])
    seen = (run.path.parent, Path.cwd() / "d")
    check_files(site, ["d/b.fasta", "--variants=/mounted/v.csv", "12"], seen)
    check_files(replace(site, container="none"), ["data/a.fasta"], seen)
    for words in (["data/a.fasta"], [f"--variants={Path.cwd()}/data/a.fasta"], ["link/../data/a.fasta"]):
        with pytest.raises(ConfigError, match=r"data/a.fasta is not in the container: add .*/data to container_mounts"):
            check_files(site, words, seen)
    with pytest.raises(ConfigError, match="cannot hold a ':'"):
        check_files(site, [], (Path("/w/a:b"),))
