"""The first two steps of a training, to see whether it would run: what ``longseq check`` starts instead of one.

Processes, strategy, model, optimiser and loader are those of the training. Its sequences are replaced by random ones of
the full length, and nothing is kept but measurements.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from longseq.config.schema import Config
from longseq.data import vocabulary
from longseq.devices import own_device
from longseq.errors import LongseqError
from longseq.measure.memory import estimate, gib
from longseq.measure.peaks import PeakMeter, available
from longseq.measure.timing import now
from longseq.runs.run import Run
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.collectives import all_max
from longseq.training.fit import build_trainer, check_machine, run_to_its_end, training_data
from longseq.training.task import LanguageModelling
from longseq.training.vitals import Vitals

RESULTS = "check.json"
_MESSAGE = 64 << 20  # bytes of the all-reduce: large enough for bandwidth to count, and not latency
_DOCUMENT = 350  # tokens of each document, where they are packed: a protein's


@dataclass
class Measurements:
    """What a rehearsal found; the slowest and largest of all ranks."""

    device: str
    backend: str  # of the collectives; "" for one process
    bytes_per_second: float  # of an all-reduce: its message by its time; 0 for one process
    seconds: float  # of the last optimiser step
    tokens: int  # of that step, all ranks together
    peak: int  # bytes of tensors that a rank had at most


def rehearse(run: Run, config: Config, first_length: int | None = None, vitals: Vitals | None = None) -> None:
    """Make two steps and leave the measurements in the run's folder. Every rank calls it.

    first_length: of the sequences of the first step; None: the full length. vitals: told where it is.

    Raises:
        LongseqError: if the machine cannot do it, and why.
    """
    check_machine(config)
    device = own_device(config)
    _check_room(config, device)
    meter = PeakMeter(device)
    trainer = build_trainer(run, config, StopFlag(), None, vitals)
    trainer.callbacks = [_Watch(run, config, meter, first_length or config.data.length)]  # type: ignore[attr-defined]  # nothing that writes
    trainer.loggers = []
    run_to_its_end(trainer, LanguageModelling(config), training_data(config, None), None)


def _check_room(config: Config, device: torch.device) -> None:
    needed = estimate(config, vocabulary(config).size, on_cuda=device.type == "cuda")
    processes = 1 if device.type == "cuda" else config.trainer.devices  # that share the memory
    free = available(device)
    if needed.peak * processes > free:
        raise LongseqError(
            f"{processes} process(es) here need {needed.line()}, and {gib(free)} are free: raise trainer.accumulate or "
            "trainer.zero_stage, set trainer.activation_checkpointing=true, or lower data.length."
        )


class _Watch(pl.Callback):
    def __init__(self, run: Run, config: Config, meter: PeakMeter, first_length: int):
        self.run, self.config, self.meter, self.first_length = run, config, meter, first_length
        self.began = self.seconds = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(task, LanguageModelling)
        length = self.config.data.length if trainer.global_step else self.first_length
        parts = self.config.trainer.context_parallel
        shape = self.config.batch_sequences, -(-length // parts)
        tokens = torch.randint(vocabulary(self.config).ordinary, shape, device=task.device)
        scored = tokens.numel() * parts * trainer.accumulate_grad_batches
        batch.clear()  # what the model gets, and not only what we see
        if self.config.data.reset:
            batch["segments"] = self._documents(shape, task)
        batch.update(tokens=tokens, targets=tokens, step_targets=torch.tensor(scored, device=task.device))
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.began = now(task.device)

    def _documents(self, shape: tuple[int, int], task: LanguageModelling) -> torch.Tensor:
        """Which document each token of this rank's slice belongs to, in rows packed with documents of one length."""
        context = task.model.context
        first = context.rank * shape[1] if context else 0
        places = torch.arange(first, first + shape[1], device=task.device)
        return (places // _DOCUMENT).expand(shape).contiguous()

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds = now(task.device) - self.began

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        slowest = torch.tensor([self.seconds, float(self.meter.stop())], dtype=torch.float64, device=task.device)
        seconds, peak = all_max(slowest).tolist()
        name = torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else "CPU"
        found = Measurements(
            device=name,
            backend=str(dist.get_backend()) if trainer.world_size > 1 else "",
            bytes_per_second=all_reduce_rate(task.device),
            seconds=seconds,
            tokens=self.config.samples_per_step * self.config.data.length,
            peak=int(peak),
        )
        if trainer.is_global_zero:
            (self.run.path / RESULTS).write_text(json.dumps(asdict(found)))


def all_reduce_rate(device: torch.device) -> float:
    """Bytes per second of an all-reduce of 64 MiB over all ranks, the same on all of them; 0 for one process.

    Raises:
        LongseqError: if the sum is not that of all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0
    message = torch.empty(_MESSAGE // 4, device=device)
    times = []
    for _ in range(3):
        message.fill_(1.0)
        dist.barrier()
        began = now(device)
        dist.all_reduce(message)
        times.append(now(device) - began)
        if not bool((message == dist.get_world_size()).all()):
            raise LongseqError("an all-reduce gave a wrong sum: the network or a device is damaged.")
    # What is decided by it is decided by all: the slowest rank's time.
    slowest = torch.tensor(min(times), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return _MESSAGE / float(slowest)
