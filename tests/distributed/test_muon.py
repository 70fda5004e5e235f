"""Muon on several processes: whatever ZeRO makes of the weights, every step of a matrix is orthogonal and the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import checkpoint, curve, largest_difference, longseq

pytestmark = pytest.mark.distributed

MUON = ("optim.name=muon", "optim.weight_decay=0", "model.ffn=swiglu", "trainer.max_steps=6")
KEPT = ("trainer.checkpoint_every=1", "trainer.keep_checkpoints=6")
MAPS = {"attention.qkv.weight": 3, "attention.out.weight": 1, "mlp.0.weight": 2, "mlp.2.weight": 1}
RATE = 0.003
TOLERANCE = 1e-4
WAYS = {
    "ddp": ("trainer.strategy=ddp", "trainer.devices=2"),
    **{f"zero-{stage}": ("trainer.devices=2", f"trainer.zero_stage={stage}") for stage in range(4)},
    "zero-3 of one": ("trainer.zero_stage=3",),
    **{f"bf16 zero-{n}": ("trainer.devices=2", f"trainer.zero_stage={n}", "trainer.precision=bf16") for n in range(4)},
}
_LONG = ("zero-0", "zero-1", "zero-3 of one", "bf16 zero-1", "bf16 zero-2")


def masters(saved: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint, each in one piece."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for shard in (saved / "training").glob("rank-*.safetensors"):
        for key, tensor in load_file(shard).items():
            kind, start, name = key.split(":", 2)
            if kind == "fp32":
                pieces.setdefault(name, {})[int(start)] = tensor
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


@pytest.fixture(scope="module")
def alone(fit: Callable[..., Path]) -> Path:
    return fit("muon-alone", *MUON, *KEPT, "trainer.strategy=single")


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.long if way in _LONG else ()) for way in WAYS])
def test_every_step_of_a_matrix_is_orthogonal_and_that_of_one_process(fit, alone, way):
    run = fit(f"muon-{way.replace(' ', '-')}", *MUON, *KEPT, *WAYS[way])
    shapes = {name: x.shape for name, x in load_file(checkpoint(run, 6) / "model.safetensors").items()}
    before, after = (masters(checkpoint(run, step)) for step in (5, 6))
    seen = 0
    for name, maps in ((name, n) for name in before for end, n in MAPS.items() if name.endswith(end)):
        rows, columns = shapes[name.removeprefix("model.")]
        step = ((after[name] - before[name]) / (0.2 * RATE)).view(maps, rows // maps, columns).double()
        values = torch.linalg.svdvals(step) / math.sqrt(max(step.shape[1:]))
        assert values.median() > 0.6, name
        assert values.max() < 1.3, name
        seen += maps
    assert seen == 2 * 7
    if "bf16" not in way:
        for tag in ("train/loss", "train/gradient_norm"):
            assert largest_difference(curve(run, tag), curve(alone, tag)) < TOLERANCE, tag


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero-2", "zero-3"),
        pytest.param("zero-3", "ddp", marks=pytest.mark.long),
        pytest.param("zero-3", "zero-3 of one", marks=pytest.mark.long),
    ],
)
def test_another_stage_strategy_or_world_goes_on_with_the_same_losses(fit, folder, stopped, alone, before, after):
    run = stopped(fit(f"muon-{before}", *MUON, *KEPT, *WAYS[before]), f"muon-{before}-to-{after}".replace(" ", "-"), 3)
    alone_now = ("trainer.devices=1",) if "of one" in after else ()
    ended = longseq("resume", run, *alone_now, *WAYS[after], folder=folder)
    assert ended.code == 0, ended.err
    assert largest_difference(curve(run, "train/loss"), curve(alone, "train/loss")) < TOLERANCE


@pytest.mark.parametrize("way", ["zero-2", "zero-3"])
def test_the_same_world_goes_on_to_the_last_bit(fit, folder, stopped, way):
    whole = fit(f"muon-{way}", *MUON, *KEPT, *WAYS[way])
    run = stopped(whole, f"muon-{way}-again", 3)
    ended = longseq("resume", run, folder=folder)
    assert ended.code == 0, ended.err
    one, other = (masters(checkpoint(where, 6)) for where in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
