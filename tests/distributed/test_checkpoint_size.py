"""How large checkpoints are, against what a start reckons with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import checkpoint
from longseq.data import vocabulary
from longseq.runs.checkpoint import expected_bytes
from longseq.runs.run import Run

pytestmark = pytest.mark.distributed

# 600,000 weights, so that headers and counters are next to nothing; one short step.
ONE_STEP = (
    *("model.dim=128", "model.depth=3", "model.heads=2", "model.ffn_dim=512", "trainer.max_steps=1"),
    *("trainer.valid_every=0", "data.batch_tokens=128"),
)
WAYS = {
    "single": ("trainer.strategy=single",),
    **{f"zero-{stage}": ("trainer.devices=2", f"trainer.zero_stage={stage}") for stage in (1, 2, 3)},
}


def size(run: Run) -> int:
    return sum(path.stat().st_size for path in checkpoint(run.path, 1).rglob("*") if path.is_file())


def reckoned(run: Run, *, ema: bool) -> int:
    config = run.config()
    return expected_bytes(config.performer_spec(vocabulary(config).size).parameter_count, ema=ema)


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_as_large_as_a_start_reckons(fit: Callable[..., Path], way: str) -> None:
    run = Run.open(fit(f"size-{way}", *WAYS[way], *ONE_STEP, "trainer.ema_decay=0.9"))
    assert size(run) == pytest.approx(reckoned(run, ema=True), rel=0.1)
    without = size(run) - (checkpoint(run.path, 1) / "ema.safetensors").stat().st_size
    assert without == pytest.approx(reckoned(run, ema=False), rel=0.1)


def test_without_a_running_mean_a_checkpoint_is_as_large_as_a_start_reckons(fit: Callable[..., Path]) -> None:
    run = Run.open(fit("size-without", *WAYS["single"], *ONE_STEP))
    assert size(run) == pytest.approx(reckoned(run, ema=False), rel=0.1)
