"""A run of several sources whose weights change when it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from command_line import checkpoint, checkpoints, curve
from longseq.data import split_spec
from longseq.runs.run import Run
from longseq_data.samples.draw import Draw
from ways.sources import LENGTH
from ways.test_ways import SETTINGS


def weights(source, *values: float) -> str:
    train = source.keys[0].removeprefix("data.train=")
    one, two = (path.split(",")[0].rstrip("}]") for path in train.split("path: ")[1:])
    return f"data.train=[{{path: {one}, weight: {values[0]}}}, {{path: {two}, weight: {values[1]}, name: kept}}]"


def test_other_weights_hold_from_the_step_of_a_resume_and_sources_go_on(data, here, longseq, refused):
    source = data("mixture", "two")
    words = [*source.keys[1:], *SETTINGS, "data.packing=crop", "trainer.checkpoint_every=1"]
    longseq("fit", "empty.yaml", weights(source, 1, 1), *words, "run.name=plain", "trainer.max_steps=8")
    longseq("fit", "empty.yaml", weights(source, 1, 1), *words, "run.name=one", "trainer.max_steps=4")
    longseq("resume", "runs/one", weights(source, 8, 1), "trainer.max_steps=8")
    config = Run.open("runs/one").config()
    assert config.data.reweighted == ["16: 1.0 1.0"]
    spec, plain = split_spec(config, "train"), Draw(5, (1, 1))
    changed = Draw(5, (8, 1), [(16, (1, 1))])
    assert spec.draw.counts(16) == plain.counts(16)
    assert spec.draw.counts(999) == changed.counts(999) != plain.counts(999)
    before, after = curve(Path("runs/plain"), "train/loss"), curve(Path("runs/one"), "train/loss")
    assert [after[step] for step in range(1, 5)] == [before[step] for step in range(1, 5)]
    assert after[8] != before[8]
    passes = curve(Path("runs/one"), "data/epochs/kept")
    size = spec.parts[1].epoch_samples
    assert passes == pytest.approx({step: count / size for step, count in counted(changed, 8)})
    # From an earlier checkpoint, as after a loss of the newer ones, the same is drawn again.
    for step in checkpoints(Path("runs/one")):
        if step > 3:
            shutil.rmtree(checkpoint(Path("runs/one"), step))
    longseq("resume", "runs/one")
    assert curve(Path("runs/one"), "train/loss") == after
    assert "data.train" in refused("resume", "runs/one", *source.keys[2:3], f"data.train={here / 'empty.yaml'}")


def counted(draw: Draw, steps: int) -> list[tuple[int, int]]:
    """Samples of the second source after each step of four."""
    assert f"data.batch_tokens={4 * LENGTH}" in SETTINGS
    return [(step, draw.counts(4 * step)[1]) for step in range(1, steps + 1)]
