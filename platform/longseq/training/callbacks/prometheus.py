"""A text file per node that Prometheus's node_exporter reads."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

import lightning.pytorch as pl

from longseq.config.schema import Config
from longseq.runs.owner import node_name
from longseq.runs.run import Run
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.gauges import memory_so_far
from longseq.training.callbacks.steps import AfterSteps
from longseq_data.files import aside, resolved, user_path
from longseq_data.os_errors import explained

_SECONDS = 10.0  # between two writings
_LAST_WORDS_SECONDS = 5.0
# name: meaning. All are gauges.
METRICS = {
    "longseq_step": "Optimiser steps done.",
    "longseq_last_step": "Step at which the training ends.",
    "longseq_loss": "Training loss of the last point of the curves, in nats per target.",
    "longseq_tokens_per_second": "Speed of all processes together, without padding, at the last point of the curves.",
    "longseq_seconds_since_last_step": "Seconds since the last step ended, or the training began.",
    "longseq_memory_bytes": "Memory of the node's first process: resident, or the most allocated on its GPU lately.",
}


def exposition(values: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """Values in Prometheus's text format, version 0.0.4, those that are NaN left out."""
    words = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    lines = []
    for name, value in values.items():
        if not math.isnan(value):
            lines += [f"# HELP {name} {METRICS[name]}", f"# TYPE {name} gauge", f"{name}{{{words}}} {value!r}"]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Prometheus(AfterSteps):
    """The first process of each node keeps ``longseq-RUN-NODE-HASH.prom`` in ``trainer.prometheus`` to the end.

    A thread writes every ten seconds, whether the training moves or not: what hangs is seen by the seconds since its
    last step.
    """

    def __init__(self, run: Run, config: Config, curves: Curves):
        assert config.trainer.prometheus is not None
        self.curves, self.last_step = curves, config.trainer.max_steps
        folder, node = resolved(user_path(config.trainer.prometheus)), node_name()
        where = os.fsencode(run.path.absolute())  # another run may have this one's name, in another folder
        self.path = folder / f"longseq-{run.path.name}-{node}-{hashlib.sha256(where).hexdigest()[:8]}.prom"
        self.labels = {"run": run.path.name, "node": node, "folder": where.decode(errors="replace")}
        self.step, self.stepped = 0, time.monotonic()
        self.over = threading.Event()
        self.writing: threading.Thread | None = None

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.step, self.stepped, self.device = trainer.global_step, time.monotonic(), task.device
        if trainer.local_rank == 0:
            self.writing = threading.Thread(target=self._keep, name="prometheus", daemon=True)
            self.writing.start()

    def on_step(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        self.step, self.stepped = step, time.monotonic()

    def teardown(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self.writing is not None:
            self.over.set()
            self.writing.join(_LAST_WORDS_SECONDS)
            self.writing = None

    def _values(self) -> dict[str, float]:
        shown = self.curves.shown
        values = (
            *(self.step, self.last_step, shown.get("loss", math.nan), shown.get("tokens_per_second", math.nan)),
            *(time.monotonic() - self.stepped, memory_so_far(self.device)),
        )
        return dict(zip(METRICS, map(float, values), strict=True))

    def _keep(self) -> None:
        said = False
        while not self.over.is_set():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with aside(self.path) as partial:
                    partial.write_text(exposition(self._values(), self.labels), encoding="utf-8")
            except OSError as error:  # for people: no reason to stop
                if not said:
                    what = f"{explained(error, self.path)} (trainer.prometheus)"
                    print(f"longseq: warning: {what}", file=sys.stderr, flush=True)
                said = True
            self.over.wait(_SECONDS)
        with suppress(OSError):  # a file that stays is of a run that has ended, as its time says
            self.path.unlink(missing_ok=True)
