"""Processes, ZeRO stages, accumulation, recomputation: none of them changes what is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import curve, largest_difference

pytestmark = pytest.mark.distributed

Fit = Callable[..., Path]
TOLERANCE = 1e-4  # nats, over 20 steps; one record's loss in another place moves a step by about 1e-2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_have_the_losses_of_one(
    one_process: Path, two_processes: Callable[[int], Path], stage: int
) -> None:
    run = two_processes(stage)
    assert len(curve(run, "train/loss")) == 20
    for tag in ("train/loss", "valid/loss", "train/accuracy", "train/gradient_norm"):
        assert largest_difference(curve(run, tag), curve(one_process, tag)) < TOLERANCE, tag


def test_losses_stay_equal_with_padding_masking_and_accumulation(fit: Fit) -> None:
    """Crops of different lengths: a rank's, and a batch's, share of the targets is never the same."""
    masked = ("model.objective=masked", "data.packing=crop")
    one = curve(fit("masked-one", *masked, "trainer.zero_stage=0"), "train/loss")
    two = curve(fit("masked-two", *masked, "trainer.devices=2", "trainer.accumulate=2"), "train/loss")
    assert len(one) == 20
    assert largest_difference(one, two) < TOLERANCE


def test_accumulated_batches_have_the_losses_of_one_batch(fit: Fit, one_process: Path) -> None:
    """And its gradient: AdamW hides a wrong scale from the losses for as long as nothing is clipped."""
    accumulated = fit("accumulated", "trainer.accumulate=2", "trainer.zero_stage=1")
    for tag in ("train/loss", "valid/loss", "train/gradient_norm"):
        assert largest_difference(curve(accumulated, tag), curve(one_process, tag)) < TOLERANCE, tag


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_recomputing_activations_changes_no_loss(fit: Fit, two_processes: Callable[[int], Path], stage: int) -> None:
    recomputed = fit(
        f"recomputed-{stage}",
        "trainer.devices=2",
        f"trainer.zero_stage={stage}",
        "trainer.activation_checkpointing=true",
    )
    for tag in ("train/loss", "valid/loss"):
        assert largest_difference(curve(recomputed, tag), curve(two_processes(stage), tag)) < 1e-6, tag


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1)), 2, 3])
def test_bf16_learns(fit: Fit, one_process: Path, stage: int) -> None:
    two = ("trainer.devices=2", f"trainer.zero_stage={stage}", "trainer.checkpoint_every=10")
    half = fit(f"bf16-{stage}", *two, "trainer.precision=bf16")
    losses = list(curve(half, "train/loss").values())
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2
    # bf16 has 8 bits of mantissa, and CPUs differ in how they sum products of such numbers (AMX, AVX-512 or neither):
    # 1e-3 nats at first and up to 6e-3 after 15 steps were seen. An optimiser step more or less moves all by 2e-2.
    full = list(curve(one_process, "train/loss").values())
    assert losses == pytest.approx(full, abs=1e-2)
    assert abs(sum(losses) - sum(full)) / len(full) < 3e-3
    assert losses[:3] == pytest.approx(full[:3], abs=2e-3)
    assert losses != full


def test_a_slurm_job_around_it_changes_nothing(fit: Fit, one_process: Path) -> None:
    """Inside an allocation (salloc, an interactive job) the processes are still longseq's own."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOBID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "4",
        "SLURM_NPROCS": "4",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NODELIST": "node[1-2]",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
    }
    inside = fit("slurm", "trainer.max_steps=5", "trainer.zero_stage=1", environment=job)
    five = {step: loss for step, loss in curve(one_process, "train/loss").items() if step <= 5}
    assert curve(inside, "train/loss") == five


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (3, "trainer.activation_offload=true"),  # layer by layer, whole blocks gathered
        (2, "trainer.accumulate=2"),  # all layers, tile by tile
        pytest.param(2, "trainer.strategy=ddp", marks=pytest.mark.long),
    ],
)
def test_tiles_of_the_sequence_change_no_loss(
    fit: Fit, two_processes: Callable[[int], Path], stage: int, more: str
) -> None:
    name = f"tiled-{more.partition('=')[0].rpartition('.')[2]}"
    tiled = fit(name, "trainer.devices=2", f"trainer.zero_stage={stage}", "model.sequence_tile=24", more)
    for tag in ("train/loss", "valid/loss", "train/accuracy", "train/gradient_norm"):
        assert largest_difference(curve(tiled, tag), curve(two_processes(stage), tag)) < TOLERANCE, tag


@pytest.mark.parametrize(
    "more",
    [
        ("trainer.zero_stage=3", "trainer.activation_checkpointing=true", "trainer.context_parallel=2"),
        pytest.param(("trainer.zero_stage=3", "model.sequence_tile=24"), marks=pytest.mark.long),
        pytest.param(("trainer.strategy=ddp",), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_modern_block_has_the_losses_of_one_process(fit: Fit, more: tuple[str, ...]) -> None:
    """Packed documents, so that the convolution has borders to keep, of records and of slices."""
    how = ("model.block=modern", "optim.name=muon", "data.reset=true", "trainer.max_steps=12")
    one, two = fit("modern-one", *how), fit(f"modern-{len(more)}", *how, "trainer.devices=2", *more)
    for tag in ("train/loss", "valid/loss", "train/gradient_norm"):
        assert largest_difference(curve(two, tag), curve(one, tag)) < TOLERANCE, tag
