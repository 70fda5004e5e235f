"""`trainer.compile`: blocks that torch.compile has compiled learn what others do, and leave the same checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from command_line import checkpoint, curve, largest_difference, longseq
from longseq.models.compiling import missing_compiler

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no C++ compiler"),
]

Fit = Callable[..., Path]
TOLERANCE = 1e-4  # nats, over 20 steps
HALFWAY = "trainer.checkpoint_every=10"
TIMEOUT = 600  # compiling takes a minute


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(("trainer.strategy=single",), marks=pytest.mark.long),  # "compiled first", below, is one
        pytest.param(("trainer.strategy=ddp", "trainer.devices=2"), marks=pytest.mark.long),
        ("trainer.zero_stage=2", "trainer.devices=2"),
        pytest.param(("trainer.zero_stage=3", "trainer.devices=2"), marks=pytest.mark.long),
    ],
    ids=["single", "DDP", "ZeRO-2", "ZeRO-3"],
)
def test_compiled_blocks_change_no_loss(fit: Fit, one_process: Path, strategy: tuple[str, ...]) -> None:
    """Over validations, probes and two redraws."""
    name = "compiled-" + strategy[0].partition("=")[2]
    settings = "trainer.compile=true", "trainer.probe_every=10", HALFWAY
    run = fit(name, *settings, *strategy, timeout=TIMEOUT)
    for tag in ("train/loss", "valid/loss", "train/accuracy", "train/gradient_norm"):
        assert largest_difference(curve(run, tag), curve(one_process, tag)) < TOLERANCE, tag


def names(run: Path) -> dict[str, list[int]]:
    with safe_open(checkpoint(run, 10) / "model.safetensors", "pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled first", "compiled after"])
def test_a_run_goes_on_with_and_without_a_compiler(
    fit: Fit, stopped: Callable[..., Path], one_process: Path, compiled: bool, folder: Path
) -> None:
    single = "trainer.strategy=single", HALFWAY, *(("trainer.compile=true",) if compiled else ())
    first = fit(f"first-{compiled}", *single, timeout=TIMEOUT)
    assert names(first) == names(one_process)
    run = stopped(first, f"goes-on-{compiled}", 10)
    ended = longseq("resume", run, f"trainer.compile={str(not compiled).lower()}", folder=folder, timeout=TIMEOUT)
    assert ended.code == 0, ended.err
    for tag in ("train/loss", "valid/loss"):
        assert largest_difference(curve(run, tag), curve(one_process, tag)) < TOLERANCE, tag


def test_without_a_compiler_it_says_so(folder: Path) -> None:
    nothing = {**os.environ, "PATH": str(folder), "CXX": "no-such-compiler"}
    ended = longseq(
        "fit", "tiny.yaml", "run.name=no-compiler", "trainer.compile=true", folder=folder, environment=nothing
    )
    assert ended.code == 1
    assert "trainer.compile=true, but there is no C++ compiler" in ended.err
    assert "set trainer.compile=false" in ended.err
