"""What the model is worth while it is trained: ``trainer.benchmarks`` as curves."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from longseq.config.schema import Config
from longseq.errors import LongseqError
from longseq.models.performer import PerformerLM
from longseq.models.weights import full_state_dict
from longseq.pinned import Copies
from longseq.training.benchmarks import Live, Watched, live, shared, watched
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.steps import due, sharded_weights
from longseq.training.callbacks.times import Clock
from longseq.training.collectives import ControlGroup
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars


class Benchmarks(StepBoundary):
    """Measures a copy of the weights, whole and in fp32 on each rank's device, as a checkpoint of the step would have.

    The training itself is not touched: no mode, no gradient, no random state; and with ZeRO-3 no rank waits for others
    but while weights are copied. Its place is before the checkpoints among the callbacks: a resume goes on behind both.
    """

    def __init__(self, config: Config, curves: Curves, clock: Clock):
        self.config, self.curves, self.clock = config, curves, clock
        self.watched: list[Watched] = []
        self.doing = ""

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.control = ControlGroup()
        self.watched = watched(self.config)

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        these = [each for each in self.watched if due(step, each.own.every)]
        if not these:
            return
        assert isinstance(task, LanguageModelling)
        vitals = self.clock.vitals
        mark = vitals.mark
        with self.curves.paused(), self.clock.profile("benchmark"), _as_read():
            source = self._copy(task, step)
            counts = [each.parts(source) for each in these]
            own = {}
            for which, part in shared(counts, trainer.global_rank, trainer.world_size):
                own[f"{which} {part}"] = self._measured(these[which], source, part)
            del source
            # Ranks wait for the slowest one here, and not in the next step.
            found: dict[str, Any] = {}
            for text in self.control.gather(json.dumps(own)):
                found |= json.loads(text or "{}")
            vitals.mark = mark + 1  # which are those of one place again, however many parts a rank had
        for which, (each, count) in enumerate(zip(these, counts, strict=True)):
            self._log(trainer, each, step, [found[f"{which} {part}"] for part in range(count)])

    def _copy(self, task: LanguageModelling, step: int) -> Live:
        """The model as ``longseq benchmark`` opens the checkpoint of this step. All ranks call it."""
        copies = Copies()
        state = full_state_dict(task.model, sharded_weights(self.config), keep=True, by=copies)
        copies.wait()
        model = PerformerLM(live(self.config, step).reading_spec(task.device.type))
        model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
        model.set_step(max(0, step - 1))
        # However long a benchmark takes, each pass is a sign of life.
        model.embedding.register_forward_pre_hook(lambda *_: self.clock.vitals.at(self.doing))
        return live(self.config, step, model.to(task.device).eval())

    def _measured(self, each: Watched, source: Live, part: int) -> dict[str, Any]:
        self.doing = f"benchmark {each.own.name}"
        try:
            return {"found": each.part(source, part)}
        except LongseqError as error:
            return {"error": str(error)}

    def _log(self, trainer: pl.Trainer, each: Watched, step: int, parts: list[dict[str, Any]]) -> None:
        name = each.own.name
        errors = [part["error"] for part in parts if "error" in part]
        if errors:
            if trainer.is_global_zero:
                what = f"benchmark {name} has no point at step {step}: {errors[0]} The training goes on."
                print(f"longseq: warning: {what}", file=sys.stderr, flush=True)
            return
        points = each.points([part["found"] for part in parts])
        points = {curve: value for curve, value in points.items() if not math.isnan(value)}
        if not points:
            return
        log_scalars(trainer, f"benchmark/{name}", points, step)
        if self.curves.bar:
            shown = "  ".join(f"{curve} {value:.4f}" for curve, value in points.items())
            self.curves.bar.say(f"step {step}  benchmark {name}: {shown}")


@contextmanager
def _as_read() -> Iterator[None]:
    """Inside, products are as exact as where a checkpoint is read, and what is drawn is no part of the run."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
