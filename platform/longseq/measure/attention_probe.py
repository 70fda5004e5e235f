"""Look in where a model's queries, keys and values meet: attention maps, and how far attention is from exact.

Both matrices are read out by giving one-hot vectors as values (Choromanski et al. 2020, arXiv 2009.14794, appendix
C.4), so that the implementation that trains is the one that is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from longseq.attention import FavorAttention, SlicedDocuments, exact_attention
from longseq.models.compiling import uncompiled
from longseq.models.layers import Block
from longseq.models.performer import PerformerLM

MAP_LENGTH = 128  # positions of an attention map: one pixel or more each

# A layer's attention, q, k, v (B, H, L, D) as they arise there, and segments and gates.
Look = Callable[[FavorAttention, Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"], None]


@dataclass(frozen=True)
class LayerProbe:
    """One layer. Maps are (heads, queries, keys)."""

    error: float  # ‖own − exact‖ / ‖exact‖ of the outputs
    own: Tensor
    exact: Tensor


@torch.no_grad()
def probe(model: PerformerLM, batch: dict[str, Tensor]) -> list[LayerProbe]:
    """Send a batch of one row through the model and look at each layer's attention. Changes nothing."""
    layers: list[LayerProbe] = []

    def look(
        attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, gate: Tensor | None
    ) -> None:
        own = FavorAttention.mix(attention, q, k, v, None, segments, gate)
        error = _error(own, _exact(attention, q, k, v, segments, gate))
        shown = slice(0, MAP_LENGTH)
        q, k = q[:, :, shown], k[:, :, shown]
        segments = None if segments is None else segments[:, shown]
        gate = None if gate is None else gate[:, :, shown]
        one_hot = _one_hot(q, v.dtype)
        own_map = FavorAttention.mix(attention, q, k, one_hot, None, segments, gate)
        exact_map = _exact(attention, q, k, one_hot, segments, gate)
        layers.append(LayerProbe(error, own_map[0].float().cpu(), exact_map[0].cpu()))

    look_through(model, batch, look)
    return layers


@torch.no_grad()
def attention_weights(model: PerformerLM, tokens: Tensor) -> list[Tensor]:
    """Each layer's attention (B, heads, queries, keys) over whole rows of tokens (B, L), in fp32. Changes nothing."""
    layers: list[Tensor] = []

    def look(
        attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, gate: Tensor | None
    ) -> None:
        layers.append(FavorAttention.mix(attention, q, k, _one_hot(q, v.dtype), None, segments, gate).float())

    look_through(model, {"tokens": tokens}, look)
    return layers


@torch.no_grad()
def errors(
    model: PerformerLM, batch: dict[str, Tensor], features: Sequence[int], draws: int
) -> list[list[list[float]]]:
    """The error of each attention by features with other numbers of them: [layer][number][draw]. Changes nothing."""
    layers: list[list[list[float]]] = []

    def look(
        attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, gate: Tensor | None
    ) -> None:
        if not attention.options.has_features:
            return
        exact = _exact(attention, q, k, v, segments, gate)
        before = attention.options, attention.draw
        found: list[list[float]] = []
        for m in features:
            found.append([])
            for draw in range(draws):
                attention.options, attention.draw = replace(before[0], features=m), before[1] + draw
                found[-1].append(_error(FavorAttention.mix(attention, q, k, v, None, segments, gate), exact))
        attention.options, attention.draw = before
        layers.append(found)

    look_through(model, batch, look)
    return layers


def look_through(model: PerformerLM, batch: dict[str, Tensor], look: Look) -> None:
    """Call ``look`` in each layer while a batch goes through the model as it is."""
    training = model.training
    model.eval()
    try:
        with model.whole_sequences(), uncompiled(model), _watched(model, look):
            model(batch["tokens"], None, batch.get("segments"))
    finally:
        model.train(training)


@contextmanager
def _watched(model: PerformerLM, look: Look) -> Iterator[None]:
    """Inside of the layer's forward, where ZeRO-3 has its weights."""
    attentions = [block.attention for block in model.blocks if isinstance(block, Block)]
    for attention in attentions:
        attention.mix = partial(_mix, attention, look)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention.mix


def _mix(
    attention: FavorAttention,
    look: Look,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    segments: Tensor | SlicedDocuments | None,
    gate: Tensor | None = None,
) -> Tensor:
    assert not isinstance(segments, SlicedDocuments)  # whole sequences
    look(attention, q, k, v, segments, gate)
    return FavorAttention.mix(attention, q, k, v, padding, segments, gate)


def _one_hot(q: Tensor, dtype: torch.dtype) -> Tensor:
    """A value for each key, (B, H, L, L); in the model's own dtype, for its ω is rounded to that."""
    size = q.shape[2]
    return torch.eye(size, device=q.device, dtype=dtype).expand(*q.shape[:2], size, size)


def _exact(
    attention: FavorAttention, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, gate: Tensor | None
) -> Tensor:
    q, k = attention.framed(q, k)
    softmax = partial(exact_attention, causal=attention.causal, decay=attention.decay, gate=gate)
    return softmax(q.float(), k.float(), v.float(), segments=segments)


def _error(own: Tensor, exact: Tensor) -> float:
    return float((own.float() - exact).norm() / exact.norm().clamp_min(1e-30))
