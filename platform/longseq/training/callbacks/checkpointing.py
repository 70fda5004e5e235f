"""Checkpoints at step boundaries: every n steps, at the end, and when a stop was asked for."""

from __future__ import annotations

import shutil

import lightning.pytorch as pl

from longseq import checkpoint
from longseq.checkpoint import TrainingPosition
from longseq.config import Config
from longseq.run import Run
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.curves import not_finite
from longseq.training.callbacks.stopping import StopFlag, StopRequested
from longseq.training.collectives import ControlGroup
from longseq.training.task import LanguageModelling
from longseq.training.weights import full_state_dict, save_weights


class Checkpointing(StepBoundary):
    """Writes a checkpoint aside, then gives it its name; raises :class:`StopRequested` after a stop's checkpoint."""

    def __init__(self, run: Run, config: Config, stop: StopFlag):
        self.run, self.config, self.stop = run, config, stop

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.control = ControlGroup()
        self.stop.install()

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        every, last = self.config.trainer.checkpoint_every, self.config.trainer.max_steps
        stopping = self.control.any(self.stop.requested) and step < last
        if stopping or step >= last or (every and step % every == 0):
            assert isinstance(task, LanguageModelling)
            if self.control.any(not task.train_sums.finite):
                raise not_finite(self.run, step)
            self._save(trainer, task, step)
        if stopping:
            raise StopRequested

    def _save(self, trainer: pl.Trainer, task: LanguageModelling, step: int) -> None:
        directory = self.run.checkpoints_dir
        partial = checkpoint.partial_path(directory, step)
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.control.barrier()
        trainer.save_checkpoint(partial)
        weights = full_state_dict(task.model, self.config.trainer.zero_stage, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_weights(weights, partial / "model.safetensors")
        self.control.barrier()
        if trainer.is_global_zero:
            position = TrainingPosition(
                step=step,
                samples=step * self.config.samples_per_step,
                world_size=trainer.world_size,
                zero_stage=self.config.trainer.zero_stage,
                precision=self.config.trainer.precision,
            )
            checkpoint.publish(directory, position)
            checkpoint.prune(directory, keep=self.config.trainer.keep_checkpoints)
        self.control.barrier()
