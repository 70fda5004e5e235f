"""What the model is worth while it is trained: ``trainer.benchmarks`` as curves."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch

from longseq.config.schema import Config
from longseq.errors import LongseqError
from longseq.models.performer import PerformerLM
from longseq.models.weights import whole_tensors
from longseq.training.benchmarks import Live, Watched, live, shared, watched
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import due, sharded_weights
from longseq.training.callbacks.stopping import StopFlag
from longseq.training.callbacks.times import Clock
from longseq.training.collectives import ControlGroup
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars

_STOPS = "the training is to stop."


class _GivenUp(Exception):
    """The training is to stop, and its checkpoint waits."""


class Benchmarks(StepBoundary):
    """Measures a copy of the weights, whole and in fp32 on each rank's device, as a checkpoint of the step would have.

    The training itself is not touched: no mode, no gradient, no random state; and with ZeRO-3 no rank waits for others
    but while weights are copied. Its place is before the checkpoints among the callbacks: a resume goes on behind both.
    A stop waits for no more than a pass: what is not measured by then has no point.
    """

    def __init__(self, config: Config, stop: StopFlag, curves: Curves, clock: Clock):
        self.config, self.stop, self.curves, self.clock = config, stop, curves, clock
        self.watched: list[Watched] = []
        self.doing = ""
        self.undefined: set[str] = set()  # curves that were said to have no value

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.control = ControlGroup()
        self.watched = watched(self.config)

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        these = [each for each in self.watched if due(step, each.own.every)]
        if not these:
            return
        assert isinstance(task, LanguageModelling)
        if any(self.control.any(self.stop.requested, self.stop.out_of_time)):
            self._say(trainer, f"{', '.join(each.own.name for each in these)}: no point at step {step}: {_STOPS}")
            return
        vitals = self.clock.vitals
        mark = vitals.mark
        with self.curves.paused(), self.clock.profile("benchmark"), _as_read(task.device):
            source = self._copy(task, step)
            parts = [each.parts(source) for each in these]
            counts, own = [len(each) for each in parts], {}
            with suppress(_GivenUp):
                for which, part in shared(counts, trainer.global_rank, trainer.world_size):
                    self.doing = f"benchmark {these[which].own.name}"
                    own[f"{which} {part}"] = _measured(parts[which][part])
            del source, parts  # and the copy of the weights
            # Ranks wait for the slowest one here, and not in the next step.
            found: dict[str, Any] = {}
            for text in self.control.gather(json.dumps(own)):
                found |= json.loads(text or "{}")
            # The watchdog compares how far ranks are by their marks, and ranks with more parts have made more of them:
            # from here on all have the same again.
            vitals.mark = mark + 1
        for which, (each, count) in enumerate(zip(these, counts, strict=True)):
            self._log(trainer, each, step, [found.get(f"{which} {part}") for part in range(count)])

    def _copy(self, task: LanguageModelling, step: int) -> Live:
        """The model as ``longseq benchmark`` opens the checkpoint of this step. All ranks call it."""
        with task.device:  # the CPU's memory holds no copy, of which each of a node's ranks would have one
            model = PerformerLM(live(self.config, step).reading_spec(task.device.type))
        own = model.state_dict()
        with torch.no_grad():
            for name, tensor in whole_tensors(task.model, sharded_weights(self.config)):
                own.pop(name).copy_(tensor)
        assert not own, own.keys()
        model.set_step(max(0, step - 1))
        model.embedding.register_forward_pre_hook(self._pass)
        return live(self.config, step, model.to(task.device).eval())

    def _pass(self, *_: object) -> None:
        """Each pass is a sign of life, however long a benchmark takes; and none begins when the training is to stop."""
        if self.stop.requested or self.stop.out_of_time:
            raise _GivenUp
        self.clock.vitals.at(self.doing)

    def _say(self, trainer: pl.Trainer, what: str) -> None:
        if trainer.is_global_zero:
            print(f"longseq: warning: benchmark {what}", file=sys.stderr, flush=True)

    def _log(self, trainer: pl.Trainer, each: Watched, step: int, parts: list[dict[str, Any] | None]) -> None:
        name = each.own.name
        measured = [part for part in parts if part is not None]
        errors = [part["error"] for part in measured if "error" in part]
        if errors:
            return self._say(trainer, f"{name} has no point at step {step}: {errors[0]} The training goes on.")
        if len(measured) < len(parts):
            return self._say(trainer, f"{name} has no point at step {step}: {_STOPS}")
        points = each.points([part["found"] for part in measured])
        undefined = [curve for curve, value in points.items() if math.isnan(value)]
        if new := [curve for curve in undefined if f"{name}/{curve}" not in self.undefined]:
            self.undefined |= {f"{name}/{curve}" for curve in new}
            self._say(trainer, f"{name} has no {', '.join(new)} at step {step}: not defined for what it found.")
        points = {curve: value for curve, value in points.items() if curve not in undefined}
        if not points:
            return None
        log_scalars(trainer, f"benchmark/{name}", points, step)
        if self.curves.bar:
            shown = "  ".join(f"{curve} {value:.4f}" for curve, value in points.items())
            self.curves.bar.say(f"step {step}  benchmark {name}: {shown}")
        return None


def _measured(part: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"found": part()}
    except LongseqError as error:
        return {"error": str(error)}
    except torch.OutOfMemoryError as error:  # no collective waits in here, and the training has what it had
        return {"error": f"the device's memory is too small for it ({str(error).partition('.')[0]})."}


@contextmanager
def _as_read(device: torch.device) -> Iterator[None]:
    """Inside, products are as exact as where a checkpoint is read, and what is drawn is no part of the run."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
