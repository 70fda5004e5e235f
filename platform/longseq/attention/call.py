"""One call of attention: what it is asked for, one check of it, and its arguments as the operations read them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import gates
from longseq.attention.arguments import dtypes, floating, whole
from longseq.attention.feature_maps import feature_map
from longseq.attention.options import AttentionOptions, OprfA
from longseq.attention.scan import Rows


@dataclass(frozen=True, eq=False)
class Call:
    """One call of attention: a layer's options, and what differs between layers and between steps.

    Attributes:
        seed, layer, draw: what the projections are a function of; ``draw`` may be a tensor while a program is traced.
        far_share, decay: (heads,) or None, as of :func:`longseq.attention.favor_attention`.
        gate: (batch, heads, length) or None, likewise.
        log_decay: ``decay`` is log γ, as a layer learns it.
    """

    options: AttentionOptions
    causal: bool = False
    seed: int = 0
    layer: int = 0
    draw: int | Tensor = 0
    oprf_a: OprfA = 0.0
    far_share: Tensor | None = None
    decay: Tensor | None = None
    gate: Tensor | None = None
    log_decay: bool = False

    @classmethod
    def of(cls, **asked: Any) -> Call:
        """Out of options of both kinds by name."""
        own = {name: asked.pop(name) for name in asked.keys() & cls.__dataclass_fields__.keys()}
        return cls(AttentionOptions(**asked), **own)

    def checked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        segments: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | None:
        """Refuse what does not fit together; the documents as segments, however they were given."""
        far_share, decay, gate = self.far_share, self.decay, self.gate
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not (q.ndim == k.ndim == v.ndim == 4):
            raise ValueError(f"q, k and v must be (batch, heads, length, dim), got {shapes}")
        if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
            raise ValueError(f"batch, heads, key length or head_dim differ: {shapes}")
        if not q.shape[-1]:
            raise ValueError(f"q and k need a head_dim of at least 1: {shapes}")
        floating(q=q, k=k, v=v, far_share=far_share, decay=decay, gate=gate)
        documents = "segments" if segments is not None else "cu_seqlens" if cu_seqlens is not None else ""
        decays = "decay" if decay is not None else "gate" if gate is not None else ""
        if decay is not None and gate is not None:
            raise ValueError("give decay or gate, not both: a decay is a gate of -decay at every position")
        self.options.check(causal=self.causal, documents=documents, decays=decays, oprf_a=self.oprf_a)
        if far_share is not None and not self.options.window:
            raise ValueError("far_share weighs the keys beyond a window: it needs window=1 or more, or to be None")
        if (self.causal or self.options.window or documents or decays) and q.shape[2] != k.shape[2]:
            raise ValueError(f"causal, windowed, packed or decaying attention needs as many queries as keys: {shapes}")
        batch, heads, length = k.shape[:3]
        if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != (batch, length)):
            raise ValueError(
                f"key_padding must be bool of shape {(batch, length)}, True where a key is real; "
                f"got {key_padding.dtype} {tuple(key_padding.shape)}"
            )
        for name, value in (("far_share", far_share), ("decay", decay)):
            if value is not None and value.shape != (heads,):
                raise ValueError(f"{name} must have one number a head, shape {(heads,)}; got {tuple(value.shape)}")
        if gate is not None and gate.shape != (batch, heads, length):
            raise ValueError(f"gate must be of shape {(batch, heads, length)}; got {tuple(gate.shape)}")
        if cu_seqlens is not None:
            if segments is not None:
                raise ValueError("give segments or cu_seqlens, not both")
            segments = _segments(cu_seqlens, batch, length)
        if segments is not None and (segments.shape != (batch, length) or not whole(segments)):
            raise ValueError(
                f"segments must be integers of shape {(batch, length)}; got {segments.dtype} {tuple(segments.shape)}"
            )
        return segments

    @property
    def rates(self) -> Tensor | None:
        """γ of each head, (heads,)."""
        return self.decay.float().exp() if self.log_decay and self.decay is not None else self.decay

    def rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        fades: bool = True,
    ) -> Rows:
        """Checked arguments as the operations read them, for each of N = batch · heads; the decay only if ``fades``."""
        operands, dtype = dtypes(q, k, v)
        batch, heads, _, head_dim = q.shape
        phi, options = None, self.options
        if options.has_features:
            phi = feature_map(
                options.kernel, options.features, head_dim, seed=self.seed, layer=self.layer, draw=self.draw,
                projection=options.projection, oprf_a=self.oprf_a, device=q.device, dtype=dtype, operands=operands,
            )  # fmt: skip
        hidden = None if key_padding is None else ~key_padding.repeat_interleave(heads, dim=0)
        numbers = None if segments is None else document_numbers(segments).repeat_interleave(heads, dim=0)
        sums = None if self.gate is None else gates.running(self.gate.flatten(0, 1))
        rates = per_row(self.rates, batch, dtype) if fades else None
        q, k, v = (t.flatten(0, 1).to(operands) for t in (q, k, v))
        reach = options.window if options.kind == "favor" else k.shape[1]
        return Rows(q, k, v, rates, hidden, numbers, phi, reach, sums)


def per_row(per_head: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """A number a head, (heads,), for each of N = batch · heads rows: (N, 1, 1)."""
    return None if per_head is None else per_head.to(dtype)[None].expand(batch, -1).reshape(-1, 1, 1)


def document_numbers(segments: Tensor) -> Tensor:
    """The number of each position's document, counted along the row: (batch, length), never decreasing."""
    border = segments[:, 1:] != segments[:, :-1]
    return F.pad(border.cumsum(1), (1, 0))


def _segments(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    borders = cu_seqlens.tolist() if cu_seqlens.ndim == 1 and whole(cu_seqlens) else []
    if batch != 1 or borders[:1] != [0] or borders[-1] != length or any(a > b for a, b in itertools.pairwise(borders)):
        raise ValueError(
            f"cu_seqlens must be integers that rise from 0 to the length {length} over a batch of one; "
            f"got {borders[:8]}{' …' if len(borders) > 8 else ''} for a batch of {batch}"
        )
    sizes = torch.as_tensor(borders, device=cu_seqlens.device).diff()
    return torch.repeat_interleave(torch.arange(len(sizes), device=cu_seqlens.device), sizes)[None]
