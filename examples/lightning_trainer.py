"""longseq's model and data in a Lightning Trainer of your own.

    python examples/lightning_trainer.py proteins.fasta.gz
    torchrun --nproc-per-node=2 examples/lightning_trainer.py proteins.fasta.gz     # one training in 2 processes

`longseq fit` adds processes, checkpoints that resume to the last bit, curves and more. Here is what is left without it:
a LightningModule, a LightningDataModule, and whatever callbacks, loggers and strategies you have.
"""

import argparse
import math
import os

import lightning.pytorch as pl
import torch

from longseq.config.loading import config_of
from longseq.data import resolve_sources, split_spec
from longseq.training.task import LanguageModelling
from longseq_data.datamodule import SequenceDataModule


class Losses(pl.Callback):
    """A callback of your own: the loss of every step, in nats per target."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.valid: list[float] = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        self.losses.append(self._mean(task.train_sums, task))
        if trainer.is_global_zero:
            print(f"step {trainer.global_step}  loss {self.losses[-1]:.4f}", flush=True)

    def on_validation_end(self, trainer, task) -> None:
        self.valid.append(self._mean(task.valid_sums, task))
        if trainer.is_global_zero:
            print(f"validation: loss {self.valid[-1]:.4f}  perplexity {math.exp(self.valid[-1]):.2f}", flush=True)

    @staticmethod
    def _mean(sums, task) -> float:
        loss, _correct, targets, *_ = sums.take(task.device).tolist()  # what this and other ranks have counted
        return loss / max(targets, 1)


def train(file: str, steps: int) -> Losses:
    # As torchrun says it; Lightning reads the ranks, and where they meet, by itself.
    nodes, each = (int(os.environ.get(name, 1)) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    strategy = "ddp" if nodes * each > 1 else "single"
    # The sections and keys of the YAML files; what is left out has its default. A step is 2,048 tokens in all.
    config = config_of(
        {
            "model": {"preset": "tiny"},
            "attention": {"kernel": "relu", "features": 64},
            "data": {"train": [file], "length": 128, "batch_tokens": 2048, "valid_samples": 16},
            "optim": {"lr": 3e-3, "warmup_steps": 5},
            "trainer": {
                **{"max_steps": steps, "strategy": strategy, "accelerator": "cpu"},
                **{"nodes": nodes, "devices": each},
            },
        },
        "examples/lightning_trainer.py",
    )
    resolve_sources(config)
    config.check()

    task = LanguageModelling(config)
    data = SequenceDataModule(
        split_spec(config, "train"),
        split_spec(config, "valid"),
        batch_sequences=config.batch_sequences,
        valid_samples=config.data.valid_samples,
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        num_nodes=nodes,
        devices=each,
        strategy="ddp" if strategy == "ddp" else "auto",
        max_steps=steps,
        max_epochs=-1,  # the data have no end
        val_check_interval=max(1, steps // 2),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data know their rank
        gradient_clip_val=config.optim.clip,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train longseq's model with your own Trainer.")
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    train(args.file, args.steps)
