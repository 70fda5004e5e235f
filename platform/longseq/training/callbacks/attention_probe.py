"""How far each layer's attention is from exact attention, and what it looks at.

A fixed sequence goes through the model as it is. In each layer, with the queries, keys and values that arise there, the
layer's own attention is held against softmax attention: the relative error of its output, and both attention matrices,
read out by giving one-hot vectors as values (Choromanski et al. 2020, arXiv 2009.14794, appendix C.4), so that the
implementation that trains is the one that is seen.
"""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor

from longseq.config.schema import Config
from longseq.measure.attention_probe import probe
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.heatmaps import heatmaps
from longseq.training.callbacks.probe_batch import probe_batch
from longseq.training.callbacks.steps import due, sharded_weights
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars, writer


class AttentionProbe(StepBoundary):
    """Every ``trainer.probe_every`` steps, for each layer: the error as a curve, the attention maps as an image.

    For a kernel that does not estimate the softmax, and for a learned share, the error is a distance and need not fall.
    """

    def __init__(self, config: Config, curves: Curves):
        self.config, self.curves = config, curves
        self.batch: dict[str, Tensor] | None = None

    def on_step_boundary(self, trainer: pl.Trainer, task: pl.LightningModule, step: int) -> None:
        if not due(step, self.config.trainer.probe_every):
            return
        assert isinstance(task, LanguageModelling)
        if not (trainer.is_global_zero or sharded_weights(self.config)):
            return  # only sharded weights need every rank
        with self.curves.paused():
            if self.batch is None:
                self.batch = probe_batch(self.config, task.device)
            with trainer.precision_plugin.val_step_context():
                layers = probe(task.model, self.batch)
            if not trainer.is_global_zero:
                return
            found = list(enumerate(zip(layers, task.model.spec.plan, strict=True)))
            errors = {f"layer{number:02}": layer.error for number, (layer, of) in found if of.kind != "exact"}
            if errors:
                log_scalars(trainer, "attention_error", errors, step)
            for number, (layer, of) in found:
                rows = {"exact": layer.exact}
                if of.kind != "exact":
                    rows = {"FAVOR+": layer.own, **rows}
                what = "" if of.kind == "exact" else f" {of.kernel},"
                title = f"layer {number},{what} step {step}: query down, key across"
                writer(trainer).add_image(f"attention/layer{number:02}", heatmaps(title, rows), step, dataformats="HWC")
            writer(trainer).flush()
