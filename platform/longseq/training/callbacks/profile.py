"""What a few steps are made of: PyTorch's profiler, and on a GPU its memory."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from longseq.config.schema import Config
from longseq.runs.run import Run
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import AfterSteps
from longseq_data.os_errors import said

_ALLOCATIONS = 1_000_000  # that a snapshot of the memory holds, the newest


class Profile(AfterSteps):
    """From the first to the last step of ``trainer.profile_steps``, on each of ``trainer.profile_ranks``.

    Leaves ``steps-FIRST-LAST.rank-R.pt.trace.json.gz``, for Perfetto, Chrome's tracing and TensorBoard's profiler, and
    on a GPU ``….memory.pickle``, for https://pytorch.org/memory_viz. Steps are called as TensorBoard's profiler calls
    them, ``ProfilerStep#12``. A training that ends in between leaves what there is.
    """

    def __init__(self, run: Run, config: Config, curves: Curves):
        self.run, self.curves = run, curves
        self.first, self.last = config.trainer.profile_steps
        self.ranks = config.trainer.profile_ranks
        self.profiler: profile | None = None
        self.began = 0
        self.step = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.global_step >= self.last and trainer.is_global_zero:
            print(
                f"longseq: trainer.profile_steps=[{self.first}, {self.last}] lie behind step {trainer.global_step}, "
                "where this start begins: nothing is profiled.",
                file=sys.stderr,
                flush=True,
            )

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        if trainer.global_rank not in self.ranks or batch_idx % trainer.accumulate_grad_batches:
            return
        if self.first <= step <= self.last:
            if self.profiler is None:
                self._begin(task.device, step)
            self.step.enter_context(record_function(f"ProfilerStep#{step}"))

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if self.profiler is not None:
            self.step.close()
            if step >= self.last:
                self._end(trainer, task.device)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._end(trainer, task.device)

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self._end(trainer, task.device)

    def _begin(self, device: torch.device, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self.began = step
        self.profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        with self.curves.paused():
            self.profiler.start()

    def _end(self, trainer: pl.Trainer, device: torch.device) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        self.step.close()
        name = f"steps-{self.began}-{trainer.global_step}.rank-{trainer.global_rank}"
        with self.curves.paused():
            profiler.stop()
            try:
                self.run.check_start()
                self._write(profiler, device, name)
            except (OSError, RuntimeError) as error:
                what = f"{self.run.profiles_dir / name}: cannot be written ({said(error)}); the training goes on."
                print(f"longseq: warning: {what}", file=sys.stderr, flush=True)

    def _write(self, profiler: profile, device: torch.device, name: str) -> None:
        folder = self.run.profiles_dir
        folder.mkdir(exist_ok=True)

        def whole(ending: str) -> tuple[Path, Path]:
            return folder / f".partial-{name}{ending}", folder / f"{name}{ending}"

        partial, path = whole(".pt.trace.json.gz")
        try:
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
            print(f"longseq: profile: {path}", file=sys.stderr, flush=True)
            if device.type == "cuda":
                partial, path = whole(".memory.pickle")
                torch.cuda.memory._dump_snapshot(str(partial))
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            if device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
