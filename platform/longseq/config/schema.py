"""The configuration of a run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from longseq.config import checks
from longseq.config.sections import AttentionConfig, DataConfig, ModelConfig, RunConfig, Sections
from longseq.config.training import OptimConfig, TrainerConfig

__all__ = ["AttentionConfig", "Config", "DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "TrainerConfig"]


@dataclass
class Config(Sections):
    """The whole configuration of a run."""

    def check(self) -> None:
        """The arithmetic across keys, and DeepSpeed settings that would contradict them.

        Raises:
            ConfigError: with the numbers, and numbers that would do.
        """
        checks.check(self)
