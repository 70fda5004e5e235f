"""``longseq check``: what would keep a training from running is said before it, one line each."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from longseq.cli import main
from longseq.commands.check import time_line
from longseq.config.schema import Config
from longseq.launch import local

TRAIN = "data.train=proteins.fasta"


@pytest.fixture
def check(folder, capsys, monkeypatch):
    """check(override, ...): exit code, and {name: (verdict, text)} of the lines. No process is started."""

    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(local, "train", refuse)

    def check(*arguments):
        before = sorted(folder.rglob("*"))
        code = main(["check", "small.yaml", *arguments])
        assert sorted(folder.rglob("*")) == before, "nothing is left behind"
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        return code, {name: (verdict, text) for verdict, name, text in lines}

    return check


def test_a_static_check_starts_no_process(check):
    code, lines = check(TRAIN, "--static")
    assert code == 0
    assert list(lines) == ["config", "data", "disk", "memory"]
    assert all(verdict == "ok" for verdict, _ in lines.values())
    assert "activations" in lines["memory"][1]


def test_the_processes_of_all_nodes_are_counted(check):
    code, lines = check(TRAIN, "trainer.nodes=2", "trainer.devices=2")
    assert code == 0
    assert " on 4 process(es) on 2 nodes × 1 batch(es)" in lines["config"][1]
    assert lines["step"][0] == "skipped"


def test_a_wrong_configuration_ends_the_check(check):
    code, lines = check(TRAIN, "trainer.devices=3")
    assert code == 1
    assert list(lines) == ["config"]
    assert lines["config"][0] == "FAILED"
    assert "do not share evenly" in lines["config"][1]


def test_deepspeed_settings_are_part_of_the_configuration(check):
    code, lines = check(TRAIN, "deepspeed.zero_optimization.overlap_com=true")
    assert code == 1
    assert "overlap_comm" in lines["config"][1]


def test_a_bad_file_is_named_and_the_rest_is_still_looked_at(check, folder):
    (folder / "bad.fasta").write_text(">a\nMKV\n>nothing\n>b\nMKV\n")
    code, lines = check("data.train=bad.fasta")
    assert code == 1
    assert lines["data"][0] == "FAILED"
    assert f"{folder}/bad.fasta, line 3" in lines["data"][1]
    assert lines["disk"][0] == lines["memory"][0] == "ok"
    assert lines["step"][0] == "skipped"


def test_a_full_disk_is_said(check, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    code, lines = check(TRAIN, "--static")
    assert code == 1
    assert lines["disk"][0] == "FAILED"
    assert "10 MiB free" in lines["disk"][1]


@pytest.mark.parametrize(
    ("steps", "seconds", "whole", "of_one"),
    [
        (100, 0.06, "6 seconds", "12 seconds"),
        (6000, 1.5, "2.5 hours", "5.0 hours"),
        (360_000, 2.0, "200 hours", "400 hours"),
    ],
)
def test_the_time_of_the_whole_training_is_that_of_its_steps(steps, seconds, whole, of_one):
    config = Config()
    config.trainer.max_steps, config.trainer.devices, config.trainer.accelerator = steps, 2, "cpu"
    assert time_line(config, seconds).startswith(f"about {whole} for {steps:,} steps, {of_one} of one process;")
