"""How far each layer's attention is from exact attention, and what it looks at.

A fixed sequence goes through the model as it is. In each layer, with the queries, keys and values that arise there, the
layer's own attention is held against softmax attention: the relative error of its output, and both attention matrices,
read out by giving one-hot vectors as values (Choromanski et al. 2020, arXiv 2009.14794, appendix C.4), so that the
implementation that trains is the one that is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor

from longseq.attention import FavorAttention, SlicedDocuments, exact_attention
from longseq.config import Config
from longseq.models.layers import Block
from longseq.training.callbacks.boundary import StepBoundary
from longseq.training.callbacks.curves import Curves
from longseq.training.callbacks.heatmaps import heatmaps
from longseq.training.callbacks.probe_batch import probe_batch
from longseq.training.callbacks.steps import due, sharded_weights
from longseq.training.task import LanguageModelling
from longseq.training.tensorboard import log_scalars, writer

MAP_LENGTH = 128  # positions of an attention map: one pixel or more each


@dataclass(frozen=True)
class LayerProbe:
    """One layer. Maps are (heads, queries, keys)."""

    error: float  # ‖own − exact‖ / ‖exact‖ of the outputs
    own: Tensor
    exact: Tensor


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
                layers = probe(task, self.batch)
            if not trainer.is_global_zero:
                return
            if task.model.spec.attention != "exact":
                errors = {f"layer{number:02}": layer.error for number, layer in enumerate(layers)}
                log_scalars(trainer, "attention_error", errors, step)
            for number, layer in enumerate(layers):
                spec, rows = task.model.spec, {"exact": layer.exact}
                if spec.attention != "exact":
                    rows = {"FAVOR+": layer.own, **rows}
                what = "" if spec.attention == "exact" else f" {spec.kernel},"
                title = f"layer {number},{what} step {step}: query down, key across"
                writer(trainer).add_image(f"attention/layer{number:02}", heatmaps(title, rows), step, dataformats="HWC")
            writer(trainer).flush()


@torch.no_grad()
def probe(task: LanguageModelling, batch: dict[str, Tensor]) -> list[LayerProbe]:
    """Send a batch of one row through the model and look at each layer's attention. Changes nothing."""
    layers: list[LayerProbe] = []
    training = task.training
    task.eval()
    try:
        with task.model.whole_sequences(), _watched(task, layers):
            task.model(batch["tokens"], None, batch.get("segments"))
    finally:
        task.train(training)
    return layers


@contextmanager
def _watched(task: LanguageModelling, layers: list[LayerProbe]) -> Iterator[None]:
    """Look in where queries, keys and values meet: inside of the layer's forward, where ZeRO-3 has its weights."""
    attentions = [block.attention for block in task.model.blocks if isinstance(block, Block)]
    for attention in attentions:
        attention.mix = partial(_mix, attention, layers)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention.mix


def _mix(
    attention: FavorAttention,
    layers: list[LayerProbe],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    segments: Tensor | SlicedDocuments | None,
) -> Tensor:
    assert not isinstance(segments, SlicedDocuments)  # the probe's sequence is whole
    own = FavorAttention.mix(attention, q, k, v, padding, segments)
    softmax = partial(exact_attention, causal=attention.causal, decay=attention.decay)
    exact = softmax(q.float(), k.float(), v.float(), segments=segments)
    error = float((own.float() - exact).norm() / exact.norm().clamp_min(1e-30))
    shown = slice(0, MAP_LENGTH)
    q, k = q[:, :, shown].float(), k[:, :, shown].float()
    segments = None if segments is None else segments[:, shown]
    size = q.shape[2]
    one_hot = torch.eye(size, device=q.device).expand(*q.shape[:2], size, size)
    own_map = FavorAttention.mix(attention, q, k, one_hot, None, segments)
    exact_map = softmax(q, k, one_hot, segments=segments)
    layers.append(LayerProbe(error, own_map[0].cpu(), exact_map[0].cpu()))
    return own
