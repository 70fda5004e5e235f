from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from longseq import checkpoint
from longseq.checkpoint import Checkpoint, TrainingPosition
from longseq.config import Config
from longseq.config_loading import load_config
from longseq.run import Run

FASTA = "".join(f">r{i}\n{'MKVLAACDEFGHIKLMNPQ'[i % 7 :]}\n" for i in range(40))
# Small enough to be refused in no time, and to be trained in no time if a refusal is missing.
SMALL = "model: {preset: tiny}\ndata: {length: 16, batch_tokens: 64}\ntrainer: {max_steps: 8, accelerator: cpu}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the FASTA file proteins.fasta and the configuration small.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proteins.fasta").write_text(FASTA)
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Config:
    return load_config("small.yaml", [f"data.train={folder}/proteins.fasta", "run.name=one"])


@pytest.fixture
def run(config: Config) -> Run:
    """A run that no process has trained."""
    return Run.create(config, default_name="unused")


@pytest.fixture
def publish(run: Run) -> Callable[..., Checkpoint]:
    """publish(step): a checkpoint of ``run`` with two files, as one fp32 process would have written it."""

    def publish(step: int) -> Checkpoint:
        partial = checkpoint.partial_path(run.checkpoints_dir, step)
        (partial / "checkpoint").mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(bytes(range(256)) * step)
        (partial / "checkpoint" / "shard.pt").write_bytes(b"optimiser")
        position = TrainingPosition(
            step=step,
            samples=4 * step,
            world_size=1,
            zero_stage=2,
            precision="fp32",
            accumulate=1,
            unlogged=(0.0, 0.0, 0.0),
        )
        return checkpoint.publish(run.checkpoints_dir, position)

    return publish
