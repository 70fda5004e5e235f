"""The configuration next to the final metrics, so that runs compare in TensorBoard's HParams tab."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from longseq.config.schema import Config
from longseq.training.tensorboard import flush, writer

# TensorBoard shows the last point of these curves.
_METRICS = ("valid/loss", "valid/perplexity", "valid/accuracy", "train/loss", "train/tokens_per_second", "machine/mfu")
# What says where a run is or what is kept and shown of it, not what it learns or how fast.
_ASIDE = (
    *("run.name", "run.dir", "data.train", "data.valid", "data.test", "data.ood", "data.reweighted"),
    "data.accept_changes",
    *("data.valid_samples", "data.strict", "trainer.accelerator", "trainer.valid_every", "trainer.checkpoint_every"),
    *(
        "trainer.keep_checkpoints",
        "trainer.keep_best",
        "trainer.keep_every",
        "trainer.memory_checkpoint_every",
        "trainer.log_every",
        "trainer.probe_every",
    ),
    *("trainer.sample_tokens", "trainer.histogram_every", "trainer.noise_every", "trainer.peak_tflops"),
    *("trainer.loggers", "trainer.prometheus", "trainer.profile_steps", "trainer.profile_ranks"),
    *("trainer.time_limit", "trainer.offload_path", "finetune.table", "finetune.feature_seed"),
)
# TensorBoard shows five columns until it is told more: these.
_FIRST = ("attention.kernel", "attention.kind", "data.length", "model.preset", "optim.lr")


class Hyperparameters(pl.Callback):
    """Writes the keys at the start of a run, once for all its starts, and its success at the end."""

    def __init__(self, config: Config):
        metrics = dict.fromkeys(_METRICS, 0.0)
        self.experiment, self.start, self.end = hparams(flat(config), metrics)
        _put_first(self.experiment)

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:
            for summary in (self.experiment, self.start):
                writer(trainer).file_writer.add_summary(summary)
            flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step >= trainer.max_steps:
            writer(trainer).file_writer.add_summary(self.end)
            flush(trainer)


def flat(config: Config) -> dict[str, float | int | str]:
    """``section.key`` and value; lists and truth values as text, keys that are null left out."""
    values: dict[str, float | int | str] = {}
    sections = asdict(config)
    if config.finetune.table is None:
        del sections["finetune"]
    for section, keys in sections.items():
        for name, value in keys.items():
            full = f"{section}.{name}"
            if full not in _ASIDE and value is not None:
                if isinstance(value, bool):  # TensorBoard's table shows 0.0000 and 1.0000
                    value = str(value).lower()
                values[full] = value if isinstance(value, (int, float)) else str(value)
    return values


def _put_first(experiment: Any) -> None:
    """Mark the keys to be shown first in the way TensorBoard marks those that differ between runs."""
    metadata = experiment.value[0].metadata
    content = HParamsPluginData.FromString(metadata.plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in _FIRST
    metadata.plugin_data.content = content.SerializeToString()
