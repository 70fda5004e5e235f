"""Processes that share each sequence train what one process trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import curve, largest_difference, longseq

pytestmark = pytest.mark.distributed

Fit = Callable[..., Path]
TOLERANCE = 1e-4  # nats, over 20 steps; one record's loss in another place moves a step by about 1e-2
TWO = ("trainer.devices=2", "trainer.context_parallel=2")
FOUR = ("trainer.devices=4", "trainer.context_parallel=4")
HALF = "trainer.checkpoint_every=10"  # of the 20 steps
CURVES = ("train/loss", "valid/loss", "train/accuracy", "train/gradient_norm")

# Sequences of 63 tokens: the last slice ends in padding.
ODD = ("data.length=63", "data.batch_tokens=504")
PACKED = (*ODD, "data.reset=true", "attention.qk_norm=true", "attention.learned_decay=true")
WINDOWED = ("attention.window=5", "attention.learned_share=true")


def assert_same(run: Path, other: Path) -> None:
    for tag in CURVES:
        assert largest_difference(curve(run, tag), curve(other, tag)) < TOLERANCE, tag


def test_two_processes_with_half_a_sequence_each_train_as_one(fit: Fit, one_process: Path) -> None:
    assert_same(fit("halves", *TWO, "trainer.zero_stage=2", HALF), one_process)


def test_slices_with_different_numbers_of_targets_train_as_whole_sequences(fit: Fit) -> None:
    """Masked, padded, accumulated: a slice's share of the targets is never the same, and may be none."""
    masked = ("model.objective=masked", "data.packing=crop")
    one = fit("masked-one", *masked, "trainer.zero_stage=0")
    assert_same(fit("masked-halves", *masked, *TWO, "trainer.accumulate=2"), one)


def test_a_run_goes_on_with_whole_sequences(fit: Fit, folder: Path, one_process: Path, stopped) -> None:
    halves = fit("halves", *TWO, "trainer.zero_stage=2", HALF)
    run = stopped(halves, "halves-to-wholes", 10)
    ended = longseq("resume", run, "trainer.context_parallel=1", folder=folder)
    assert ended.code == 0, ended.err
    assert_same(run, one_process)


@pytest.mark.long
def test_a_run_goes_on_with_slices(fit: Fit, folder: Path, one_process: Path, two_processes, stopped) -> None:
    run = stopped(two_processes(2), "wholes-to-halves", 10)
    ended = longseq("resume", run, "trainer.context_parallel=2", folder=folder)
    assert ended.code == 0, ended.err
    assert_same(run, one_process)
    run = stopped(fit("halves", *TWO, "trainer.zero_stage=2", HALF), "halves-to-quarters", 10)
    ended = longseq("resume", run, "trainer.devices=4", "trainer.context_parallel=4", folder=folder)
    assert ended.code == 0, ended.err
    assert_same(run, one_process)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_zero_stage_trains_the_same(fit: Fit, one_process: Path, stage: int, recomputed: bool) -> None:
    how = (f"trainer.zero_stage={stage}", f"trainer.activation_checkpointing={recomputed}".lower())
    assert_same(fit(f"halves-{stage}-{recomputed}", *TWO, *how), one_process)


@pytest.mark.long
def test_two_groups_of_two_train_the_same(fit: Fit, one_process: Path) -> None:
    assert_same(fit("groups", "trainer.devices=4", "trainer.context_parallel=2"), one_process)


@pytest.mark.long
def test_ddp_trains_the_same(fit: Fit, one_process: Path) -> None:
    assert_same(fit("halves-ddp", *TWO, "trainer.strategy=ddp"), one_process)


@pytest.mark.long
def test_probes_look_at_whole_sequences(fit: Fit, one_process: Path) -> None:
    probed = fit("probed", *FOUR, "trainer.zero_stage=3", "trainer.probe_every=10")
    assert_same(probed, one_process)
    assert len(curve(probed, "attention_error/layer00")) == 2


@pytest.mark.long
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("more", [(), WINDOWED, ("attention.kind=exact",)])
def test_packed_documents_train_the_same_in_quarters(fit: Fit, objective: str, more: tuple[str, ...]) -> None:
    how = (*PACKED, *more, f"model.objective={objective}")
    name = "-".join((objective, *(x.partition(".")[2].replace("=", "-") for x in more[:1])))
    assert_same(fit(f"quarters-{name}", *how, *FOUR), fit(f"packed-{name}", *how))


@pytest.mark.long
def test_a_length_warmup_shortens_the_sequence_before_it_is_cut(fit: Fit) -> None:
    how = ("trainer.length_warmup_steps=10", "trainer.length_warmup_start=9")
    assert_same(fit("warm-halves", *how, *TWO), fit("warm-one", *how))
