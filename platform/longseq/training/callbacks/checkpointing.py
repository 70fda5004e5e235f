"""Checkpoints at step boundaries: every n steps, at the end, and when a stop was asked for.

Training stands still only while its state is copied; files are written, synced and hashed during the steps that follow.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.profilers import Profiler
from torch.optim import Optimizer

from longseq.config.schema import Config
from longseq.errors import LongseqError, PassingError
from longseq.runs import checkpoint
from longseq.runs.checkpoint import TrainingPosition
from longseq.runs.run import Run
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.gradients import GradientNorm, not_finite
from longseq.training.callbacks.stopping import Settled, StopFlag, StopRequested
from longseq.training.collectives import ControlGroup, group_of_its_own
from longseq.training.memory_copies import FOLDER, MemoryCopies, is_own
from longseq.training.snapshots import Snapshots
from longseq.training.task import LanguageModelling
from longseq.training.writer import Writer
from longseq_data.os_errors import may_pass

_LAST_WORDS_SECONDS = 10.0  # for a checkpoint in the making, when training ends by an error
_LONG_SECONDS = 30.0  # that the training waits for one, before it is said


class Checkpointing(StepBoundary):
    """Takes a snapshot, has it written and named; raises :class:`StopRequested` after a stop's checkpoint, and
    :class:`Settled` after that of a settled task."""

    def __init__(self, run: Run, config: Config, stop: StopFlag, gradient_norm: GradientNorm, profiler: Profiler):
        self.profiler = profiler
        self.run, self.config, self.stop, self.gradient_norm = run, config, stop, gradient_norm
        self.writer: Writer | None = None
        self.memory: MemoryCopies | None = None
        self._skipped = False

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.control = ControlGroup()
        self.writer = Writer(self.run, trainer.global_rank, trainer.world_size, self._prune)
        if self.config.trainer.memory_checkpoint_every and (folder := os.environ.get(FOLDER)):
            rank, world = trainer.global_rank, trainer.world_size
            group = group_of_its_own()
            self.memory = MemoryCopies(self.run, rank, world, world // trainer.num_nodes, group, Path(folder))

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        assert isinstance(task, LanguageModelling)
        assert self.writer is not None
        every, last = self.config.trainer.checkpoint_every, self.config.trainer.max_steps
        memory = self.memory
        in_memory = memory is not None and step % self.config.trainer.memory_checkpoint_every == 0
        asked, late, unwritten, busy, failed = self.control.any(
            self.stop.requested,
            self.stop.out_of_time,
            self.writer.failed,
            in_memory and memory is not None and not memory.ready,
            in_memory and memory is not None and (memory.failed or not self._finite(trainer, task)),
        )
        stopping = (asked or late or task.settled) and step < last
        if unwritten:
            self.finish_writing()
        if stopping or step >= last or (every and step % every == 0):
            if self.control.any(not self._finite(trainer, task))[0]:
                self.finish_writing()
                raise not_finite(self.run, step)
            self._save(trainer, task, step)
        elif in_memory and not busy and not failed:
            self._copy(trainer, task, step)
        elif busy and not failed and not self._skipped and trainer.is_global_zero:
            self._skipped = True
            text = "a copy in memory takes longer than trainer.memory_checkpoint_every steps: some are left out"
            print(f"longseq: warning: {text}.", file=sys.stderr, flush=True)
        if stopping or step >= last:
            self.finish_writing()
            self._forget(trainer)
        if task.settled and step < last:
            raise Settled
        if stopping and not asked and trainer.is_global_zero:
            limit = self.config.trainer.time_limit
            print(f"longseq: trainer.time_limit={limit} is over: saved and stopped", file=sys.stderr, flush=True)
        if stopping:
            raise StopRequested

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(trainer.strategy, Snapshots)
        if trainer.strategy.copies is not None:
            trainer.strategy.copies.hold()  # before the weights change that are being copied

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        if self.writer is not None:
            self.writer.finish(_LAST_WORDS_SECONDS)

    def _finite(self, trainer: pl.Trainer, task: LanguageModelling) -> bool:
        return task.train_sums.finite and self.gradient_norm.finite(trainer)

    def _copy(self, trainer: pl.Trainer, task: LanguageModelling, step: int) -> None:
        """As :meth:`_save`, into the nodes' memory; the snapshot that is being written to the disk stays as it is."""
        strategy = trainer.strategy
        assert isinstance(strategy, Snapshots)
        assert self.memory is not None
        position, written = self._position(trainer, task, step), strategy.snapshot
        strategy.snapshot = self.memory.snapshot
        trainer.save_checkpoint(self.memory.folder)
        assert strategy.copies is not None
        self.memory.start(strategy.snapshot, position, strategy.copies.wait)
        strategy.snapshot = written

    def _forget(self, trainer: pl.Trainer) -> None:
        """Once all is on the disk, and nobody writes any more: the nodes' memory is free again."""
        if self.memory is not None:
            writes = self.control.any(not self.memory.close())[0]  # then the job's script removes it
            if not writes and trainer.local_rank == 0 and is_own(self.memory.top):
                shutil.rmtree(self.memory.top, ignore_errors=True)

    def _position(self, trainer: pl.Trainer, task: LanguageModelling, step: int) -> TrainingPosition:
        settings = self.config.trainer
        loss_sum, correct, targets = task.train_sums.over_ranks(task.device)[:3].tolist()
        return TrainingPosition(
            step=step,
            samples=task.samples,
            world_size=trainer.world_size,
            strategy=settings.strategy,
            zero_stage=settings.zero_stage,
            precision=settings.precision,
            accumulate=settings.accumulate,
            valid_loss=task.valid_loss_at(step),
            unlogged=(loss_sum, correct, targets),
        )

    def _save(self, trainer: pl.Trainer, task: LanguageModelling, step: int) -> None:
        position, directory = self._position(trainer, task, step), self.run.checkpoints_dir
        self.finish_writing()
        partial = checkpoint.partial_path(directory, step, self.run.start)
        if trainer.is_global_zero:
            self.run.check_start()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.control.barrier()
        trainer.save_checkpoint(partial)
        strategy = trainer.strategy
        assert isinstance(strategy, Snapshots)
        assert self.writer is not None
        assert strategy.copies is not None
        self.writer.start(strategy.snapshot, position, strategy.copies.wait)

    def finish_writing(self) -> None:
        """Wait until the checkpoint in the making has its name. All ranks call it.

        Raises:
            LongseqError: on all ranks, if one of them could not write.
        """
        writer = self.writer
        assert writer is not None
        step = writer.step
        with self._said_if_long(step):
            with self.profiler.profile("write"):
                writer.finish_part()
            if self.control.any(writer.failed)[0]:
                writer.give_up()
            writer.finish()
        reasons = [reason for reason in self.control.gather(writer.reason) if reason is not None]
        if reasons:
            lasting = self.control.any(writer.failed and not may_pass(writer.error))[0]
            with suppress(OSError):  # of what fails here it may be able to list nothing, on one rank alone
                self.run.check_start()  # the reason, perhaps
            raise (LongseqError if lasting else PassingError)(self._unwritten(step, reasons[0]))

    @contextmanager
    def _said_if_long(self, step: int | None) -> Iterator[None]:
        """Nothing ends by a file system that stands still for a while, and nothing is lost: it is said."""
        began = time.monotonic()
        text = (
            f"longseq: warning: {self.run.checkpoints_dir}: the checkpoint of step {step} is being written for "
            f"{_LONG_SECONDS:g} s, and the training waits: is the file system there?"
        )
        # The log may lie on the same one: only this thread waits for it.
        timer = threading.Timer(_LONG_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
        timer.daemon = True
        if self.writer is not None and self.writer.rank == 0 and step is not None:  # None: nothing was being written
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
        seconds = time.monotonic() - began
        if timer.ident and seconds > _LONG_SECONDS:
            print(f"longseq: the training has waited {seconds:.0f} s for the file system.", file=sys.stderr, flush=True)

    def _prune(self) -> None:
        settings = self.config.trainer
        checkpoint.prune(
            self.run.checkpoints_dir, settings.keep_checkpoints, best=settings.keep_best, every=settings.keep_every
        )

    def _unwritten(self, step: int | None, reason: str) -> str:
        newest = self.run.last_good()
        kept = f"that of step {newest.position.step} is complete" if newest else "there is none before it"
        return (
            f"{self.run.checkpoints_dir}: the checkpoint of step {step} could not be written: {reason}. Of the "
            f"checkpoints, {kept}. Then go on with `{self.run.resume_command}`."
        )
