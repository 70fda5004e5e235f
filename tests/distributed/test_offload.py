"""What DeepSpeed keeps elsewhere, or steps with its own Adam: the same losses, and checkpoints that fit everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import curve, largest_difference, longseq

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4


def asynchronous_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def goes_on(folder: Path, run: Path, name: str, *overrides: str) -> Path:
    """A copy of a run, resumed from its checkpoint of step 10 to step 20."""
    copy = folder / "runs" / name
    shutil.copytree(run, copy, symlinks=True)
    ended = longseq("resume", copy, *overrides, "trainer.max_steps=20", folder=folder, timeout=600)
    assert ended.code == 0, ended.err
    return copy


def test_offloading_to_the_cpu_changes_no_loss(folder: Path, fit: Callable[..., Path], one_process: Path) -> None:
    """And what was offloaded goes on where nothing is."""
    offload = ("trainer.offload_optimizer=cpu", "trainer.offload_params=cpu", "trainer.zero_stage=3")
    half = fit("offloaded", "trainer.devices=2", *offload, "trainer.max_steps=10")
    without = ("trainer.offload_optimizer=none", "trainer.offload_params=none", "trainer.devices=1")
    run = goes_on(folder, half, "offloaded-no-more", *without)
    for tag in ("train/loss", "valid/loss", "train/gradient_norm"):
        assert largest_difference(curve(run, tag), curve(one_process, tag)) < TOLERANCE, tag


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles its Adams: needs g++")
@pytest.mark.parametrize(
    ("implementation", "stage", "overrides"),
    [("fused", 1, ()), ("fused", 0, ()), ("cpu", 2, ("trainer.offload_optimizer=cpu",)), ("cpu", 3, ())],
)
def test_deepspeeds_adams_make_the_same_steps(
    folder: Path,
    fit: Callable[..., Path],
    one_process: Path,
    implementation: str,
    stage: int,
    overrides: tuple[str, ...],
) -> None:
    """Compiled when first used, which takes minutes; then torch's goes on from what they saved."""
    name = f"{implementation}-{stage}"
    half = fit(
        *(name, f"optim.implementation={implementation}", f"trainer.zero_stage={stage}", *overrides),
        "trainer.max_steps=10",
        timeout=900,
    )
    run = goes_on(folder, half, f"{name}-torch", "optim.implementation=torch", "trainer.offload_optimizer=none")
    assert largest_difference(curve(run, "train/loss"), curve(one_process, "train/loss")) < TOLERANCE


@pytest.mark.long
@pytest.mark.skipif(not asynchronous_io(), reason="offloading to NVMe needs libaio")
def test_offloading_to_a_disk_changes_no_loss(folder: Path, fit: Callable[..., Path], tmp_path: Path) -> None:
    """DeepSpeed swaps only what is larger than a megabyte."""
    large = ("model.dim=128", "model.ffn_dim=512", "trainer.zero_stage=3")
    plain = fit("not-on-disk", *large)
    offload = ("trainer.offload_optimizer=nvme", f"trainer.offload_path={tmp_path}")
    run = goes_on(folder, fit("on-disk", *large, *offload, "trainer.max_steps=10"), "on-disk-again")
    assert list(tmp_path.rglob("*.swp"))
    assert largest_difference(curve(run, "train/loss"), curve(plain, "train/loss")) < TOLERANCE
