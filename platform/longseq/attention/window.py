"""Exact softmax attention inside a sliding window, linear in the length: the near part of a windowed Performer.

For a block of queries and the keys within reach of any of them, s_ij = q_iᵀk_j/√d − γ|i − j| where j is in reach of i:

    p_ij = exp(s_ij − lse_i),   lse_i = log Σ_j exp(s_ij),   out_i = Σ_j p_ij v_j
    ds_ij = p_ij (dout_iᵀv_j − dout_iᵀout_i + dlse_i)

With a forget gate −|G_i − G_j| is in the place of −γ|i − j| (:mod:`longseq.attention.gates`), and dG_i = Σ_j ±ds_ij −
Σ_j ±ds_ji with the sign of i − j.

Scores exist for one block at a time and are computed again in the backward pass (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longseq.attention.parts import Part
from longseq.attention.scan import Gradients, Rows
from longseq.attention.state import NOTHING

# Longer blocks compute more scores that the window hides, shorter ones make smaller products.
BLOCK = 128


@dataclass(frozen=True)
class _Band:
    """The scores near the diagonal, one block of queries at a time."""

    rows: Rows  # widened
    window: int
    causal: bool

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Each block of queries with all keys in reach of one of them."""
        length = self.rows.q.shape[1]
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            yield slice(start, stop), slice(max(0, start - self.window + 1), self._end(stop, length))

    def _end(self, stop: int, length: int) -> int:
        return stop if self.causal else min(length, stop + self.window - 1)

    def inputs(self, keys: slice) -> tuple[Tensor, Tensor]:
        k, v = self.rows.k[:, keys], self.rows.v[:, keys]
        if self.rows.hidden is None:
            return k, v
        mask = self.rows.hidden[:, keys, None]
        return k.masked_fill(mask, 0.0), v.masked_fill(mask, 0.0)

    def scores(self, queries: slice, keys: slice, k: Tensor) -> tuple[Tensor, Tensor]:
        """s (N, Q, K), −inf out of reach, and i − j (Q, K)."""
        scale = self.rows.q.shape[-1] ** -0.5
        device = self.rows.q.device
        ahead = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
            keys.start, keys.stop, device=device
        )  # i − j
        distance = ahead.abs()
        blind = distance >= self.window
        if self.causal:
            blind = blind | (ahead < 0)
        scores = torch.bmm(self.rows.q[:, queries] * scale, k.mT)
        if self.rows.decay is not None:
            scores.addcmul_(self.rows.decay, distance.to(scores), value=-1)
        if self.rows.gate is not None:
            here = self.rows.gate[:, queries.start, None]  # numbers are small next to it, where a weight is not
            of_query, of_key = ((self.rows.gate[:, 1:][:, at] - here).to(scores) for at in (queries, keys))
            scores.sub_((of_query - of_key.mT).abs_())
        if self.rows.runs is not None:
            blind = blind | (self.rows.runs[:, queries, None] != self.rows.runs[:, None, keys])
        if self.rows.hidden is not None:
            blind = blind | self.rows.hidden[:, None, keys]
        return scores.masked_fill_(blind, -torch.inf), ahead


def window_forward(rows: Rows, window: int, causal: bool) -> Part:
    """See :func:`longseq.attention.operations.window_attention`."""
    rows = rows.widened()
    band, v = _Band(rows, window, causal), rows.v
    out, lse = v.new_empty(v.shape), v.new_empty(*v.shape[:2], 1)
    for queries, keys in band.blocks():
        k_near, v_near = band.inputs(keys)
        scores, _ = band.scores(queries, keys, k_near)
        top = scores.amax(-1, keepdim=True).clamp_(min=NOTHING)
        weights = scores.sub_(top).exp_()
        den = weights.sum(-1, keepdim=True)
        torch.bmm(weights, v_near, out=out[:, queries]).div_(den.clamp_min(1.0))  # den is 0 or at least 1
        lse[:, queries] = torch.where(den == 0, NOTHING, den.log() + top)
    return out, lse


def window_backward(
    rows: Rows,
    window: int,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    wants_decay: bool,
) -> Gradients:
    """The gradients, given those of out and lse; None is zeros."""
    rows = rows.widened()
    band, (q, k, v), decay = _Band(rows, window, causal), rows.qkv, rows.decay
    dout = torch.zeros_like(out) if dout is None else dout
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    d_decay = torch.zeros_like(decay, dtype=torch.float64) if decay is not None and wants_decay else None
    d_gate = None if rows.gate is None else torch.zeros_like(rows.gate)
    for queries, keys in band.blocks():
        k_near, v_near = band.inputs(keys)
        scores, ahead = band.scores(queries, keys, k_near)
        weights = scores.sub_(lse[:, queries]).exp_()  # p; a blind query's row is exp(−inf + 1e30) = 0
        dv[:, keys].baddbmm_(weights.mT, dout[:, queries])
        shift = (dout[:, queries] * out[:, queries]).sum(-1, keepdim=True).neg_()
        if dlse is not None:
            shift += dlse[:, queries]
        d_scores = torch.baddbmm(shift, dout[:, queries], v_near.mT).mul_(weights)
        if d_decay is not None:
            d_decay -= (d_scores * ahead.abs()).sum((1, 2), keepdim=True, dtype=torch.float64)
        if d_gate is not None:
            signed = d_scores if causal else d_scores * ahead.sign()
            d_gate[:, 1:][:, queries] += signed.sum(2, keepdim=True)
            d_gate[:, 1:][:, keys] -= signed.sum(1)[..., None]
        dq[:, queries] = torch.bmm(d_scores, k_near).mul_(scale)
        dk[:, keys].baddbmm_(d_scores.mT, q[:, queries], alpha=scale)
    return Gradients(dq, dk, dv, d_decay if d_gate is None else d_gate)
