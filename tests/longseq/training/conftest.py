from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longseq.config.loading import load_config
from longseq.config.schema import Config
from longseq.training.task import LanguageModelling

TINY = ("model.dim=32", "model.depth=2", "model.heads=2", "model.ffn_dim=48", "attention.features=32")


@pytest.fixture
def task(config: Config, folder) -> Callable[..., LanguageModelling]:
    """task(override, ...): a tiny model of width 32 with 2 blocks, weights larger than at the start of a training."""

    def task(*overrides: str) -> LanguageModelling:
        made = LanguageModelling(load_config("small.yaml", [f"data.train={folder}/proteins.fasta", *TINY, *overrides]))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        return made

    return task


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Six sequences of 17 tokens; some targets are not scored."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(25, (2, 6, 17))
    targets[:, ::5] = -100
    return {"tokens": tokens, "targets": targets, "step_targets": (targets != -100).sum()}
