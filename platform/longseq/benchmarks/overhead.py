"""What the platform costs: a training step and a checkpoint, next to the same model in a bare PyTorch loop.

Both train in the same process and take turns: some steps through Lightning and DeepSpeed with the usual callbacks and
curves, then as many of a plain loop over the same batches with the same model, loss, clipping and AdamW. In the middle
of every other turn a checkpoint is saved. It is held against a plain copy of its files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longseq.benchmarks.request import OverheadRequest
from longseq.benchmarks.training_process import configuration, one_process
from longseq.config.schema import Config
from longseq.data import split_spec, vocabulary
from longseq.devices import on_cuda
from longseq.measure.timing import now
from longseq.models.performer import PerformerLM
from longseq.runs.curves import read_curves
from longseq.runs.run import Run
from longseq.training.callbacks.checkpointing import Checkpointing
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.fit import build_trainer, training_data
from longseq.training.optim import build_optimizer
from longseq.training.task import LanguageModelling
from longseq_data.samples.batches import Loader, TrainingBatches
from longseq_data.vocabulary import IGNORE

STEP_GOAL, STALL_GOAL = 1.15, 1.5


@dataclass
class OverheadResults:
    """Seconds, in the order measured; ``_cpu`` of the processor, by all threads."""

    ours: list[float] = field(default_factory=list)  # a step of turns without a checkpoint
    ours_cpu: list[float] = field(default_factory=list)
    with_checkpoint: list[float] = field(default_factory=list)  # a whole turn with one
    bare: list[float] = field(default_factory=list)  # a step of the plain loop, after each of ours
    bare_cpu: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)  # how long a checkpoint stopped the training
    copies: list[float] = field(default_factory=list)  # a plain copy of its files
    checkpoint_bytes: int = 0

    @property
    def step_ratio(self) -> float:
        """Median over the turns of a step of ours to one of the plain loop next to it."""
        return median(self.step_ratios)

    @property
    def step_ratios(self) -> list[float]:
        return [ours / bare for ours, bare in zip(self.ours, self.bare, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        """The same in CPU seconds: on a machine with other work they say more than the clock."""
        return [ours / bare for ours, bare in zip(self.ours_cpu, self.bare_cpu, strict=True)]

    @property
    def stall_ratio(self) -> float:
        """Median of the stall to the copy."""
        return median(self.stall_ratios)

    @property
    def stall_ratios(self) -> list[float]:
        return [stall / copy for stall, copy in zip(self.stalls, self.copies, strict=True)]


def _config(request: OverheadRequest, folder: Path) -> Config:
    ours = (
        *(f"model.preset={request.preset}", f"data.length={request.length}"),
        *(f"data.batch_tokens={request.length * request.batch}", "trainer.zero_stage=1", "trainer.valid_every=0"),
        *(f"trainer.checkpoint_every={2 * request.steps}", "trainer.keep_checkpoints=1"),
        f"trainer.log_every={min(10, request.steps)}",
        # One step more than is counted: the last one saves a checkpoint too.
        f"trainer.max_steps={(2 * request.rounds + 1) * request.steps + request.steps // 2 + 1}",
    )
    return configuration(folder, (*ours, *request.overrides))


def measure(request: OverheadRequest, say: Callable[[str], None]) -> OverheadResults:
    """Train both in turns."""
    results = OverheadResults()
    with one_process() as folder:
        config = _config(request, folder)
        run = Run.create(config, default_name="overhead")
        trainer = build_trainer(run, config, StopFlag(), None)
        trainer.callbacks.append(_Turns(request, run, config, results, say))  # type: ignore[attr-defined]
        trainer.fit(LanguageModelling(config), training_data(config, None))
        stalls = read_curves(run.tensorboard_dir)["time/checkpoint_seconds"]
        results.stalls = [stalls[step] for step in sorted(stalls)][: request.rounds]
    return results


def table(request: OverheadRequest, results: OverheadResults) -> str:
    """Both ratios with what they are made of."""
    ours, bare = median(results.ours), median(results.bare)
    stall, copy = median(results.stalls), median(results.copies)
    beside = median(results.with_checkpoint) - request.steps * ours - stall
    size = results.checkpoint_bytes / 1e6
    return "\n".join(
        [
            f"longseq bench overhead: {request.preset}, {request.batch} × {request.length} tokens per step"
            + "".join(f", {override}" for override in request.overrides),
            f"medians (min … max) of {request.rounds} turns of {request.steps} steps each",
            "",
            f"{'step':<12}{ours * 1e3:>9.1f} ms   {bare * 1e3:>9.1f} ms in a bare PyTorch loop",
            f"{'ratio':<12}{_range(results.step_ratios)}, goal {STEP_GOAL}",
            f"{'in CPU time':<12}{_range(results.cpu_ratios)}",
            f"{'checkpoint':<12}{stall * 1e3:>9.1f} ms   {copy * 1e3:>9.1f} ms for a plain copy of its {size:,.1f} MB",
            f"{'ratio':<12}{_range(results.stall_ratios)}, goal {STALL_GOAL}",
            "",
            f"The steps during the writing of a checkpoint took {beside * 1e3:+.1f} ms longer together.",
        ]
    )


def numbers(request: OverheadRequest, results: OverheadResults) -> dict[str, object]:
    """Everything that was measured, for the JSON file."""
    return {
        "request": asdict(request),
        **asdict(results),
        "step_ratio": results.step_ratio,
        "cpu_ratio": median(results.cpu_ratios),
        "stall_ratio": results.stall_ratio,
    }


def _range(ratios: list[float]) -> str:
    return f"{median(ratios):>9.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


class _Turns(pl.Callback):
    """Stops the training's clock after each of its turns and lets the plain loop have one."""

    def __init__(
        self, request: OverheadRequest, run: Run, config: Config, results: OverheadResults, say: Callable[[str], None]
    ):
        self.request, self.run, self.config, self.results, self.say = request, run, config, results, say

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.checkpointing = next(
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Checkpointing)
        )
        self.bare = bare_loop(self.config, task.device)
        self._begin(task)

    def _begin(self, task: pl.LightningModule) -> None:
        self.began, self.cpu_began = now(task.device), time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, step = self.request.steps, trainer.global_step
        # Half a turn later than the checkpoints: the steps during their writing belong to the same turn.
        if step % steps != steps // 2:
            return
        seconds, cpu, turn = now(task.device) - self.began, time.process_time() - self.cpu_began, step // steps
        saved = turn > 0 and turn % 2 == 0
        self.checkpointing.finish_writing()
        if turn > 1:  # the first turns warm up
            self._note(seconds, cpu, saved)
        if not saved:
            self._begin(task)
            for _ in range(steps):
                next(self.bare)
            if turn > 1:
                self.results.bare.append((now(task.device) - self.began) / steps)
                self.results.bare_cpu.append((time.process_time() - self.cpu_began) / steps)
        if turn > 1:
            self.say(f"turn {turn - 1} of {2 * self.request.rounds}")
        self._begin(task)

    def _note(self, seconds: float, cpu: float, saved: bool) -> None:
        found = self.results
        if not saved:
            found.ours.append(seconds / self.request.steps)
            found.ours_cpu.append(cpu / self.request.steps)
            return
        found.with_checkpoint.append(seconds)
        newest = self.run.last_good()
        assert newest is not None
        found.checkpoint_bytes = sum(file.stat().st_size for file in newest.path.rglob("*") if file.is_file())
        copy = self.run.path / "copy"
        began = time.perf_counter()
        shutil.copytree(newest.path, copy)
        found.copies.append(time.perf_counter() - began)
        shutil.rmtree(copy)


def bare_loop(config: Config, device: torch.device) -> Iterator[None]:
    """The plain loop: each ``next`` is one step on a batch of the same data."""
    torch.manual_seed(config.run.seed)
    spec = config.performer_spec(vocabulary(config).size)
    model: nn.Module = PerformerLM(spec).to(device).train()
    optimizer = build_optimizer(model, config.optim, spec.dim)
    batches = TrainingBatches(
        split_spec(config, "train"), batch_sequences=config.batch_sequences, accumulate=1, rank=0, world=1, start=0
    )
    for batch in Loader(batches, workers=0, pin_memory=on_cuda(config)):
        tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
        loss = loss_of(model, tokens, targets)
        loss.backward()
        if config.optim.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets."""
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
