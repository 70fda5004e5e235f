"""Data that turn out bad, and disks that turn out full, in the middle of a training run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from command_line import Command, checkpoint, checkpoints, curve, longseq
from longseq.runs.curves import read_curves

pytestmark = pytest.mark.distributed


def test_bad_record_behind_the_first_look_ends_in_one_sentence(folder: Path) -> None:
    """The look at the data before a run ends after 64 MiB; the 69th record of 1 MiB lies behind it."""
    giants = folder / "giants.fasta"
    with giants.open("w") as file:
        for number in range(68):
            file.write(f">giant_{number}\n{'ACDEFGHI' * (1 << 17)}\n")
        file.write(">nothing\n>after\nACDE\n")
    held_out = ("data.valid_fraction=0", "data.test_fraction=0", "trainer.valid_every=0")
    small_steps = ("data.packing=crop", "data.shuffle_buffer=1", "trainer.checkpoint_every=4")
    ended = longseq(
        *("fit", "tiny.yaml", "run.name=giants", "data.train=giants.fasta", "trainer.devices=2"),
        *(*held_out, *small_steps),
        folder=folder,
    )
    giants.unlink()
    assert ended.code == 1
    assert "step 4/20" in ended.err
    assert ended.sentence.startswith(f"{giants}, line 137: record 'nothing' has no residues")
    assert checkpoints(folder / "runs" / "giants") == [4]


def test_file_that_vanishes_while_worker_processes_read_it_ends_in_one_sentence(folder: Path) -> None:
    passing = folder / "passing.fasta"
    shutil.copy(folder / "proteins.fasta", passing)
    command = Command(
        *("fit", "tiny.yaml", "run.name=passing", "data.train=passing.fasta", "trainer.devices=2"),
        *("data.workers=1", "trainer.max_steps=5000"),
        folder=folder,
    )
    command.wait_for("step 3/")
    passing.unlink()
    ended = command.end()
    assert ended.code == 1
    assert ended.seconds < 60
    assert str(passing) in ended.sentence
    assert "not found" in ended.sentence


@pytest.fixture
def small_disk(folder: Path, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A file system of 12 MiB: its path, and the command prefix inside which it is mounted.

    It lives in a mount namespace of its own, which ends with the process that holds it. From here it is seen under
    that process's root.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=12m tmpfs "$0" && echo mounted && exec sleep 600'
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs unshare and nsenter (util-linux) to mount a small disk")
    holder = subprocess.Popen(
        ["unshare", "--mount", "--user", "--map-root-user", "sh", "-c", script, str(disk)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"a small disk cannot be mounted here: {holder.communicate()[1].strip()}")
        enter = ["nsenter", f"--target={holder.pid}", "--mount", "--user", "--preserve-credentials"]
        yield disk, [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
    finally:
        holder.kill()
        holder.communicate()


def test_checkpoint_that_does_not_fit_on_the_disk_spares_the_one_before(
    folder: Path, small_disk: tuple[Path, list[str]]
) -> None:
    disk, inside = small_disk
    holder = inside[1].partition("=")[2]
    seen = Path(f"/proc/{holder}/root{disk}")  # the disk, from outside its namespace
    run = seen / "full"
    command = Command(
        *("fit", "tiny.yaml", f"run.dir={disk}", "run.name=full", "trainer.devices=2", "trainer.checkpoint_every=10"),
        *("trainer.max_steps=40", "data.batch_tokens=4096", "trainer.slow_factor=0"),  # a busy core is no bad day
        folder=folder,
        inside=inside,
    )
    command.wait_for("step 12/")
    ballast = seen / "ballast"
    with ballast.open("wb") as file:  # leaves enough for the curves, too little for a checkpoint
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(seen).free - (256 << 10))
    ended = command.end()
    assert ended.code == 1
    assert str(disk) in ended.sentence
    assert "No space left on device" in ended.sentence
    assert "longseq resume" in ended.sentence
    assert checkpoints(run) in ([10], [10, 20])  # it goes on while the ballast is laid
    assert not list((run / "checkpoints").glob(".*.partial")), "what could not be written takes no room"

    ballast.unlink()
    resumed = longseq("resume", disk / "full", folder=folder, inside=inside)
    assert resumed.code == 0, resumed.err
    assert "warning" not in resumed.err
    assert checkpoints(run)[-1] == 40
    assert list(curve(run, "train/loss")) == list(range(1, 41))


def test_after_a_kill_and_a_resume_tensorboard_has_each_step_once_and_warns_of_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = ("trainer.strategy=single", "trainer.checkpoint_every=10", "trainer.max_steps=30", "trainer.valid_every=5")
    command = Command("fit", "tiny.yaml", "run.name=warned", *alone, folder=folder)
    command.wait_for("step 16/")
    for pid in [command.process.pid, *command.workers()]:
        command.kill(pid)
    command.end()
    run = folder / "runs" / "warned"
    saved = checkpoints(run)[-1]
    assert max(curve(run, "train/loss")) > saved  # there is something to go over again
    ended = longseq("resume", run, folder=folder)
    assert ended.code == 0, ended.err
    with caplog.at_level(logging.WARNING):
        tags = read_curves(run / "tensorboard").keys()
        assert {tag: list(curve(run, tag)) for tag in ("train/loss", "valid/loss")} == {
            "train/loss": list(range(1, 31)),
            "valid/loss": list(range(5, 31, 5)),
        }
        for tag in tags:
            curve(run, tag)  # each step once
    assert caplog.text == ""


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(folder: Path, stage: int) -> None:
    """An absurd learning rate throws the weights out of range within a few steps."""
    name = f"diverged-{stage}"
    ended = longseq(
        *("fit", "tiny.yaml", f"run.name={name}", "trainer.devices=2", f"trainer.zero_stage={stage}"),
        *("optim.lr=1e25", "optim.warmup_steps=0", "trainer.checkpoint_every=1", "trainer.log_every=100"),
        folder=folder,
    )
    assert ended.code == 1
    assert "not finite at step" in ended.sentence
    assert "optim.lr" in ended.sentence
    for step in checkpoints(folder / "runs" / name):
        weights = load_file(checkpoint(folder / "runs" / name, step) / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values()), step


@pytest.mark.parametrize(
    ("override", "words"),
    [("trainer.accelerator=cuda", "GPUs here"), ("trainer.precision=fp16", "needs a GPU")],
)
def test_what_the_devices_cannot_do_is_refused(folder: Path, override: str, words: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    ended = longseq("fit", "tiny.yaml", "run.name=impossible", override, folder=folder, environment=environment)
    assert ended.code == 1
    assert words in ended.sentence
    assert not (folder / "runs/impossible").exists()
