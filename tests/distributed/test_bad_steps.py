"""Steps whose loss or gradient is no number, or far too large: named, and not trained on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from command_line import Ended, checkpoint, checkpoints, curve, longseq, weights_checksum

pytestmark = pytest.mark.distributed

# Imported by every Python process of the command; damages one step of the training processes, on rank 1.
DAMAGE = """
import os, sys
if "longseq.training.worker" in sys.orig_argv and os.environ["RANK"] == "1":
    import torch
    from longseq.models.layers import Block
    from longseq.training.task import LanguageModelling
    kind, wanted = os.environ["DAMAGE"].split()
    step, forward, score = [0], Block.forward, LanguageModelling._score

    def damaged_score(self, batch, sums):
        step[0] = self.trainer.global_step + 1 if self.training else 0
        loss = score(self, batch, sums)
        return loss * 50 if kind == "spike" and step[0] == int(wanted) else loss

    def damaged(self, x, *rest):
        if step[0] == int(wanted) and self.attention.layer == 1:
            if kind == "output":
                x = x + x.new_tensor(float("nan"))
            if kind == "gradient" and x.requires_grad:
                x.register_hook(lambda gradient: gradient * float("inf"))
        return forward(self, x, *rest)

    LanguageModelling._score, Block.forward = damaged_score, damaged
"""


@pytest.fixture(scope="module")
def damaged(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """damaged(kind, name, *overrides): 20 steps on two processes, step 7 of which is damaged in one of them."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(DAMAGE)

    def damaged(kind: str, name: str, *overrides: str, step: int = 7) -> tuple[Ended, Path]:
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        ended = longseq(
            *("fit", "tiny.yaml", f"run.name={name}", "trainer.devices=2", "trainer.valid_every=0"),
            *("trainer.checkpoint_every=3", *overrides),
            folder=folder,
            environment={"PYTHONPATH": path, "DAMAGE": f"{kind} {step}"},
        )
        return ended, folder / "runs" / name

    return damaged


HOW = {
    "zero-2": ("trainer.zero_stage=2",),
    "zero-3-recomputed": ("trainer.zero_stage=3", "trainer.activation_checkpointing=true"),
    "zero-1-bf16": ("trainer.zero_stage=1", "trainer.precision=bf16"),
    "ddp": ("trainer.strategy=ddp",),
    "zero-0": ("trainer.zero_stage=0",),
}
FAST = ("zero-2", "zero-1-bf16")
HOW_MARKED = [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in HOW]


@pytest.mark.parametrize(
    "how", ["zero-2", *(pytest.param(how, marks=pytest.mark.long) for how in HOW if how != "zero-2")]
)
def test_the_step_and_the_layer_are_named_and_the_last_good_checkpoint(damaged, how):
    """log_every=100: the step is noticed though nothing is logged in it."""
    ended, run = damaged("output", f"nan-{how}", *HOW[how], "trainer.log_every=100")
    assert ended.code == 1
    assert "not finite at step 7" in ended.sentence
    assert "the output of blocks.1.attention" in ended.sentence
    assert str(checkpoint(run, 6)) in ended.sentence
    assert checkpoints(run) == [3, 6]
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint(run, 6) / "model.safetensors").values())


@pytest.mark.parametrize("how", ["zero-2", pytest.param("ddp", marks=pytest.mark.long)])
def test_a_gradient_that_overflows_is_named_too(damaged, how):
    """The gradient of what goes into block 1 comes out of block 0."""
    ended, _ = damaged("gradient", f"inf-{how}", *HOW[how])
    assert ended.code == 1
    assert "not finite at step 7" in ended.sentence
    assert "the gradient of blocks.0" in ended.sentence


@pytest.mark.parametrize("how", HOW_MARKED)
def test_a_bad_step_is_left_out_where_that_is_asked_for(damaged, how):
    bf16 = ("data.length=64",)
    ended, run = damaged("output", f"skipped-{how}", *HOW[how], *bf16, "trainer.on_bad_step=skip")
    assert ended.code == 0, ended.err
    assert ended.err.count("is left out for") == 1
    assert "step 7 is left out" in ended.err
    assert sorted(curve(run, "train/loss")) == [step for step in range(1, 21) if step != 7]
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint(run, 20) / "model.safetensors").values())


def test_a_spike_stops_the_run_before_it_is_trained_on(damaged):
    ended, run = damaged("spike", "spike", "trainer.max_steps=30", "trainer.spike_factor=3", step=25)
    assert ended.code == 1
    assert "the loss of step 25" in ended.sentence
    assert "trainer.spike_factor=3" in ended.sentence
    assert str(checkpoint(run, 24)) in ended.sentence


@pytest.mark.long
def test_a_skipped_spike_leaves_the_weights_as_they_were(damaged):
    ended, run = damaged(
        *("spike", "spike-skipped", "trainer.max_steps=25", "trainer.spike_factor=3", "trainer.on_bad_step=skip"),
        "trainer.checkpoint_every=1",
        step=25,
    )
    assert ended.code == 0, ended.err
    assert "step 25 is left out for its loss" in ended.err
    assert weights_checksum(run, 25) == weights_checksum(run, 24)
