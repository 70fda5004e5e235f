"""Checkpoints at step boundaries: every n steps, at the end, and when a stop was asked for."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
from safetensors import SafetensorError

from longseq import checkpoint
from longseq.checkpoint import TrainingPosition
from longseq.config import Config
from longseq.errors import LongseqError
from longseq.run import Run
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.gradients import GradientNorm, not_finite
from longseq.training.callbacks.stopping import StopFlag, StopRequested
from longseq.training.collectives import ControlGroup
from longseq.training.task import LanguageModelling
from longseq.training.weights import full_state_dict, save_weights


class Checkpointing(StepBoundary):
    """Writes a checkpoint aside, then gives it its name; raises :class:`StopRequested` after a stop's checkpoint."""

    def __init__(self, run: Run, config: Config, stop: StopFlag, gradient_norm: GradientNorm):
        self.run, self.config, self.stop, self.gradient_norm = run, config, stop, gradient_norm

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.control = ControlGroup()
        self.stop.install()

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        every, last = self.config.trainer.checkpoint_every, self.config.trainer.max_steps
        stopping = self.control.any(self.stop.requested) and step < last
        if stopping or step >= last or (every and step % every == 0):
            assert isinstance(task, LanguageModelling)
            if self.control.any(not (task.train_sums.finite and self.gradient_norm.finite(trainer))):
                raise not_finite(self.run, step)
            self._save(trainer, task, step)
        if stopping:
            raise StopRequested

    def _save(self, trainer: pl.Trainer, task: LanguageModelling, step: int) -> None:
        directory = self.run.checkpoints_dir
        partial = checkpoint.partial_path(directory, step)
        loss_sum, correct, targets = task.train_sums.over_ranks(task.device)[:3].tolist()
        position = TrainingPosition(
            step=step,
            samples=task.samples,
            world_size=trainer.world_size,
            zero_stage=self.config.trainer.zero_stage,
            precision=self.config.trainer.precision,
            accumulate=self.config.trainer.accumulate,
            unlogged=(loss_sum, correct, targets),
        )
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.control.barrier()
        try:
            trainer.save_checkpoint(partial)
            weights = full_state_dict(task.model, self.config.trainer.zero_stage, keep=trainer.is_global_zero)
            if trainer.is_global_zero:
                save_weights(weights, partial / "model.safetensors")
            self.control.barrier()
            if trainer.is_global_zero:
                checkpoint.publish(directory, position)
                checkpoint.prune(directory, keep=self.config.trainer.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _why_unwritten(error, directory, task.model.spec.parameter_count)
            if reason is None:
                raise
            raise self._unwritten(step, reason) from error
        self.control.barrier()

    def _unwritten(self, step: int, reason: str) -> LongseqError:
        newest, _ = self.run.newest_checkpoint()
        kept = f"that of step {newest.position.step} is intact" if newest else "there is none before it"
        return LongseqError(
            f"{self.run.checkpoints_dir}: the checkpoint of step {step} could not be written ({reason}); {kept}. Mend "
            f"that, then go on with `{self.run.resume_command}`."
        )


def _why_unwritten(error: Exception, directory: Path, parameters: int) -> str | None:
    """Why a checkpoint's file could not be written; None for an error that is not about writing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch's writer does not say why.
    if not any(name in str(error) for name in ("inline_container", "PytorchStreamWriter")):
        return None
    full = shutil.disk_usage(directory).free < checkpoint.expected_bytes(parameters)
    return os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
