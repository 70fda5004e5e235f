"""Exact attention over slices: the slices of keys come by one after another, and are never all on one rank.

At step t a rank sends its own keys and values to the rank t places behind it, and gets those of the rank t places
before: a ring (Liu et al. 2023, arXiv 2310.01889) whose messages do not wait for each other. While a slice travels, the
one that came before it is computed. With scores s_ij = q_iᵀk_j/√d − γ|i − j| and the slices' keys J_0, J_1, ...

    top ← max(top, max_{j ∈ J} s_ij)
    den ← den e^{old top − top} + Σ_{j ∈ J} e^{s_ij − top},   num likewise with v_j        a log-sum-exp merge a slice
    out_i = num_i / den_i,   lse_i = top_i + log den_i

and backward, the slices coming by once more,

    p_ij = e^{s_ij − lse_i},   ds_ij = p_ij (dout_iᵀv_j − dout_iᵀout_i)
    dq_i = Σ_j ds_ij k_j/√d,   dk_j = Σ_i ds_ij q_i/√d,   dv_j = Σ_i p_ij dout_i

and with forget gates, whose sums G all ranks know of all positions (:mod:`longseq.attention.gates`), −|G_i − G_j| in
the place of −γ|i − j| and dG_i = Σ_j ±ds_ij − Σ_j ±ds_ji. What a rank finds for another's keys goes home at once. It
holds two foreign slices at most, and scores of a block of queries by one slice. A step sends n · (d + e) numbers per
head forward, and twice as many backward. Causal
queries see no later slice, so rank r computes r + 1 of them: the last rank, with all, sets the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longseq.attention.context.group import ContextGroup
from longseq.attention.context.halo import exchange
from longseq.attention.first_order import Saved, first_order
from longseq.attention.state import NOTHING, widened

_SCORES = 2**24  # that exist at a time

Received = Callable[[], list[Tensor | None]]


@dataclass(frozen=True, eq=False)
class Slices:
    """What is known of all slices.

    Attributes:
        causal: queries do not see later keys.
        hidden: (P, B, n) bool, True where a key is padding, or None.
        runs: (P, B, n) the numbers of documents, which do not see each other, or None.
        gates: (P, B, H, n) float64, G counted from the sequence's beginning, or None.
    """

    context: ContextGroup
    causal: bool
    hidden: Tensor | None
    runs: Tensor | None
    gates: Tensor | None = None

    def places(self, step: int) -> tuple[int, int]:
        """Who gets this rank's slice at a step, and whose slice comes; beyond the group: nobody."""
        to, whence = self.context.rank + step, self.context.rank - step
        return (to, whence) if self.causal else (to % self.context.size, whence % self.context.size)

    def visits(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, Tensor] | None]]:
        """(step, rank, its keys and values) of every slice, this rank's own first; None where none comes."""
        own = torch.cat((k, v), dim=-1)
        here: Tensor | None = own
        whence = self.context.rank
        for step in range(self.context.size):
            coming: Received | None = None
            if step + 1 < self.context.size:
                to, following = self.places(step + 1)
                coming = exchange(self.context, [(to, own)], [following])
            yield step, whence, None if here is None else self._read(here, k.shape[-1], whence)
            if coming is not None:
                (here,), whence = coming(), following

    def _read(self, message: Tensor, width: int, of: int) -> tuple[Tensor, Tensor]:
        if self.hidden is not None:  # 0 · NaN would be NaN
            message = message.masked_fill(self.hidden[of][:, None, :, None], 0.0)
        message = widened(message)
        return message[..., :width], message[..., width:]

    def blocks(self, q: Tensor) -> Iterator[slice]:
        """Queries whose scores with a slice exist at a time."""
        batch, heads, length, _ = q.shape
        size = max(16, _SCORES // max(1, batch * heads * length))
        return (slice(start, min(start + size, length)) for start in range(0, length, size))

    def scores(self, q: Tensor, k: Tensor, decay: Tensor | None, queries: slice, of: int) -> tuple[Tensor, Tensor]:
        """s (B, H, Q, n), −inf where a query does not see the key, of q that are scaled; and distances i − j (Q, n)."""
        rank, length = self.context.rank, k.shape[2]
        at = torch.arange(length, device=k.device)
        ahead = (at[queries, None] + (rank - of) * length) - at
        scores = q[:, :, queries] @ k.mT
        if decay is not None:
            scores = scores - decay[:, None, None] * ahead.abs()
        if self.gates is not None:
            here = self.gates[rank][..., queries.start, None]  # the numbers are small next to it
            of_query, of_key = (self.gates[rank][..., queries] - here).to(q), (self.gates[of] - here).to(q)
            scores = scores - (of_query[..., None] - of_key[..., None, :]).abs_()
        blind = (ahead < 0)[None] if self.causal and of == rank else None
        if self.runs is not None:
            others = self.runs[rank][:, queries, None] != self.runs[of][:, None]
            blind = others if blind is None else blind | others
        if self.hidden is not None:
            hidden = self.hidden[of][:, None]
            blind = hidden if blind is None else blind | hidden
        return scores if blind is None else scores.masked_fill_(blind[:, None], -torch.inf), ahead


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, slices: Slices, decay: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """Exact attention of this rank's queries over the keys of all ranks; all ranks of the group call it.

    Args:
        q, k, v: (B, H, n, d or e) of this rank's slice.
        decay: (H,) γ, or None; its gradient is this rank's part of a sum over the ranks.
        gate: (B, H, n) G counted from this slice's beginning, if there are gates.

    Returns:
        (B, H, n, e) in the dtype of v; zeros for a query that sees no key.
    """
    made: Tensor = _Ring.apply(q, k, v, decay, gate, slices)
    return made


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, gate: Tensor | None, slices: Slices
    ) -> Tensor:
        scaled, rates = widened(q) * q.shape[-1] ** -0.5, None if decay is None else decay.to(widened(q).dtype)
        top = scaled.new_full((*q.shape[:3], 1), NOTHING)
        den, total = torch.zeros_like(top), scaled.new_zeros(*v.shape)
        for _, of, keys in slices.visits(k, v):
            for at in slices.blocks(q) if keys is not None else ():
                assert keys is not None
                scores, _ = slices.scores(scaled, keys[0], rates, at, of)
                higher = torch.maximum(top[:, :, at], scores.amax(-1, keepdim=True))
                fading = (top[:, :, at] - higher).exp_()
                weights = scores.sub_(higher).exp_()
                den[:, :, at] = den[:, :, at] * fading + weights.sum(-1, keepdim=True)
                total[:, :, at] = total[:, :, at] * fading + weights @ keys[1]
                top[:, :, at] = higher
        out: Tensor = total / den.clamp_min(torch.finfo(den.dtype).tiny)  # the largest term is 1, or there is none
        lse = torch.where(den == 0, NOTHING, den.log() + top)
        ctx.slices = slices
        ctx.save_for_backward(q, k, v, decay, out, lse)
        return out.to(v.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, out, lse = saved
        slices, scale = ctx.slices, q.shape[-1] ** -0.5
        scaled, dout = widened(q) * scale, widened(dout)
        rates = None if decay is None else decay.to(scaled.dtype)
        shift = (dout * out).sum(-1, keepdim=True)
        dq = torch.zeros_like(scaled)
        d_decay = None if decay is None else torch.zeros_like(decay, dtype=torch.float64)
        d_gate = None if slices.gates is None else torch.zeros_like(slices.gates[0])
        widths = k.shape[3], v.shape[3], int(slices.gates is not None)
        own = scaled.new_zeros(*k.shape[:3], sum(widths))
        coming: Received | None = None

        def arrive() -> None:
            found = None if coming is None else coming()[0]
            if found is not None:
                own.add_(found)

        for step, of, keys in slices.visits(k, v):
            found = torch.zeros_like(own) if step else own
            for at in slices.blocks(q) if keys is not None else ():
                assert keys is not None
                scores, ahead = slices.scores(scaled, keys[0], rates, at, of)
                weights = scores.sub_(lse[:, :, at]).exp_()  # a query that sees nothing: exp(−inf + 1e30) = 0
                d_scores = (dout[:, :, at] @ keys[1].mT).sub_(shift[:, :, at]).mul_(weights)
                dq[:, :, at] += d_scores @ keys[0]
                found[..., : widths[0]] += d_scores.mT @ scaled[:, :, at]
                found[..., widths[0] : sum(widths[:2])] += weights.mT @ dout[:, :, at]
                if d_decay is not None:
                    d_decay -= (d_scores * ahead.abs()).sum((0, 2, 3), dtype=torch.float64)
                if d_gate is not None:
                    signed = d_scores * ahead.sign()
                    d_gate[:, :, at] += signed.sum(3)
                    found[..., -1] -= signed.sum(2)
            arrive()
            if step:  # home: backwards along the way that the keys came
                coming = exchange(slices.context, [(of, found)], [slices.places(step)[0]])
        arrive()
        dk, dv, of_keys = own.split(widths, dim=-1)
        d_decay = None if d_decay is None else d_decay.to(decay.dtype)
        if d_gate is not None:
            d_gate += of_keys[..., 0]
            context = slices.context
            later = context.gather_rows(d_gate.sum(-1))[context.rank + 1 :]  # slices that count on from this one's end
            d_gate[..., -1] += later.sum(0)
        return dq.mul_(scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_decay, d_gate, None
