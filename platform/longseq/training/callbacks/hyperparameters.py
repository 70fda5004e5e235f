"""The configuration beside the final metrics, so that runs compare in TensorBoard's HParams tab."""

from __future__ import annotations

from dataclasses import asdict

import lightning.pytorch as pl
from torch.utils.tensorboard.summary import hparams

from longseq.config import Config
from longseq.training.tensorboard import flush, writer

# TensorBoard shows the last point of these curves.
_METRICS = ("valid/loss", "valid/perplexity", "valid/accuracy", "train/loss", "train/tokens_per_second", "machine/mfu")
# What says where a run is, not what it is.
_PLACES = ("run.name", "run.dir", "data.train", "data.valid", "data.test", "data.ood")


class Hyperparameters(pl.Callback):
    """Writes the keys at the start of a run, once for all its starts, and its success at the end."""

    def __init__(self, config: Config):
        metrics = dict.fromkeys(_METRICS, 0.0)
        self.experiment, self.start, self.end = hparams(flat(config), metrics)

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:
            for summary in (self.experiment, self.start):
                writer(trainer).file_writer.add_summary(summary)
            flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step >= trainer.max_steps:
            writer(trainer).file_writer.add_summary(self.end)
            flush(trainer)


def flat(config: Config) -> dict[str, float | int | str | bool]:
    """``section.key`` and value; lists as text, keys that are null left out."""
    values = {}
    for section, keys in asdict(config).items():
        for name, value in keys.items():
            full = f"{section}.{name}"
            if full not in _PLACES and value is not None:
                values[full] = value if isinstance(value, (bool, int, float)) else str(value)
    return values
