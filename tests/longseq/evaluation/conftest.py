from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from longseq.cli import main
from longseq.config.loading import load_config
from longseq.data import resolve_sources, vocabulary
from longseq.models.performer import PerformerLM
from longseq.models.weights import save_weights
from longseq.runs import checkpoint
from longseq.runs.run import Run
from longseq.training.shards import write
from positions import position

TINY = ("model.dim=32", "model.depth=2", "model.heads=2", "model.ffn_dim=48", "attention.features=32")
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def trained(folder: Path) -> Callable[..., Path]:
    """trained(name, override, ..., steps=(20,)): a run folder with checkpoints of a tiny model, as if trained.

    Its training data are proteins.fasta, 40 records; data.test is test.fasta, of 30 records of 1 to 90 residues.
    """
    rng = random.Random(1)
    records = (f">t{i}\n{''.join(rng.choices(LETTERS, k=3 * i + 1))}\n" for i in range(30))
    (folder / "test.fasta").write_text("".join(records))

    def trained(name: str = "one", *overrides: str, steps: tuple[int, ...] = (20,)) -> Path:
        data = ("data.train=proteins.fasta", "data.test=test.fasta", "data.packing=crop", "data.length=64")
        own = {key.partition("=")[0] for key in overrides}
        defaults = [word for word in (*data, *TINY) if word.partition("=")[0] not in own]
        config = load_config("small.yaml", [*defaults, f"run.name={name}", *overrides])
        resolve_sources(config)
        run = Run.create(config, default_name="unused")
        for step in steps:
            torch.manual_seed(step)
            model = PerformerLM(config.performer_spec(vocabulary(config).size))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(6)  # a model that has opinions
            file = folder / "weights.safetensors"
            save_weights(model.state_dict(), file)
            partial = checkpoint.partial_path(run.checkpoints_dir, step)
            facts = asdict(write(partial / "model.safetensors", file.read_bytes()))
            checkpoint.publish(run.checkpoints_dir, position(step), {"model.safetensors": facts})
        return run.path

    return trained


@pytest.fixture
def longseq(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """longseq(word, ...): what a command prints; it must end well."""

    def longseq(*words: object) -> str:
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return longseq


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(word, ...): the one sentence that a command ends with; it prints nothing else of its own."""

    def refused(*words: object) -> str:
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        assert code == 1
        assert shown.out == ""
        last = shown.err.strip().splitlines()[-1]
        assert last.startswith("longseq: error: ")
        assert last.endswith(".")
        return last.removeprefix("longseq: error: ")

    return refused
