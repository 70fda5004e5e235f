"""Where training stands, for tests that have not trained."""

from __future__ import annotations

from longseq.runs.checkpoint import TrainingPosition


def position(step: int, valid_loss: float | None = None) -> TrainingPosition:
    return TrainingPosition(
        step=step,
        samples=4 * step,
        world_size=1,
        strategy="deepspeed",
        zero_stage=2,
        precision="fp32",
        accumulate=1,
        valid_loss=valid_loss,
        unlogged=(0.0, 0.0, 0.0),
    )
