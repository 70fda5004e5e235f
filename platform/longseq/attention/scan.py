"""The scan: each query over the keys at least ``delay`` positions before it, in linear time, forward and backward.

Everything causal is this one operation: plain FAVOR+ is delay 0; beyond an exact window of w it is delay w; the right
half of a bidirectional window is the same on the reversed sequence. It returns (out, lse), lse the logarithm of the
denominator, so that parts over disjoint keys combine exactly (:func:`longseq.attention.parts.combine`).

For a chunk of queries with running state S (sums over earlier keys of [v, 1], log-scale c), the key chunk ``delay``
positions earlier with log-scales b, ṽ = [v, 1]:

    M_i   = max(c, max_{j ≤ i} b_j)                        a scale that depends on no later key
    A_ij  = (φ(q_i)ᵀφ(k_j)) · exp(b_j − M_i),  j ≤ i       keys of this chunk
    ñ_i   = Σ_j A_ij ṽ_j + e^{c−M_i} Sᵀφ(q_i)              numerator, and denominator in the last column
    out_i = ñ_i[:e] / ñ_i[e],   lse_i = log ñ_i[e] + M_i + log-scale of φ(q_i)

Backward, from the last chunk to the first, with the gradient of ñ

    g_i = [dout_i, dlse_i − dout_iᵀ out_i] / ñ_i[e]

and R = Σ over later queries of φ(q_i) g_iᵀ e^{c'−M_i}, c' the log-scale after this chunk's keys:

    dA_ij   = (g_iᵀṽ_j) · exp(b_j − M_i),  j ≤ i
    dφ(q_i) = Σ_j dA_ij φ(k_j) + e^{c−M_i} S g_i
    dφ(k_j) = Σ_i dA_ij φ(q_i) + e^{b_j−c'} R ṽ_j
    dṽ_j    = Σ_i A_ij g_i     + e^{b_j−c'} Rᵀφ(k_j)

Two more things act on the log-scales alone. A decay e^{−γ(i−j)} adds γ·j to b_j, j counted from the chunk's start so
that the numbers stay small, and takes γ·C from c between chunks. A document boundary empties the state: queries of
another document than the state's last key do not read it, and it keeps only the last document's keys.

The state before every ``KEEP``-th chunk is kept for the backward pass, those between are built again by addition:
rebuilding them by subtraction would drift. Features exist for ``KEEP`` chunks at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longseq.attention.feature_maps import FeatureMap
from longseq.attention.state import NOTHING, AttentionState, inverse, with_ones

# Shorter chunks have less of the square that grows with them, longer ones fewer passes over the (m, e) state.
CHUNK = 64
# A state a chunk is m·(e + 1)·4 bytes / 64 tokens: 1 KB a token and head at m = 256, e = 64. Every fourth: 260 bytes.
KEEP = 4


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    delay: int = 0,
    hidden: Tensor | None = None,
    runs: Tensor | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query i over the keys j ≤ i − delay, by features.

    Args:
        q, k: (N, L, d), N = batch · heads, fp32 or float64.
        v: (N, L, e), same dtype.
        feature_map: the kernel.
        delay: how many positions the nearest visible key lies before the query.
        hidden: (N, L) bool, True where a key is padding and must not be seen, or None.
        runs: (N, L) integers that never decrease; a query sees keys of its own number only. None: one document.
        decay: (N, 1, 1) γ ≥ 0; every weight is multiplied by e^{−γ(i−j)}. None: no decay.

    Returns:
        out (N, L, e) and lse (N, L, 1), the log of the denominator. A query that sees no key gets zeros and −1e30.
    """
    return _Scan.apply(q, k, v, decay, hidden, runs, feature_map, delay)


@dataclass(frozen=True)
class _Chunk:
    """What forward and backward both need of one chunk of queries and the keys ``delay`` positions before it."""

    queries: slice
    keys: slice
    fq: Tensor  # (N, C, m)
    q_scale: Tensor  # (N, C, 1)
    fk: Tensor  # (N, K, m), K ≤ C: fewer at the beginning of a delayed scan
    values: Tensor  # ṽ (N, K, e + 1)
    weights: Tensor  # exp(b_j − M_i), 0 where i does not see j: (N, C, K)
    row_scale: Tensor  # M (N, C, 1)
    carried: Tensor  # exp(c − M_i), 0 where the state is another document's: (N, C, 1)


@dataclass(frozen=True)
class _Keys:
    """One chunk of keys, ready to enter the state."""

    at: slice
    k: Tensor  # (N, K, d), zeros where hidden
    features: Tensor  # (N, K, m)
    scale: Tensor  # b (N, K, 1), −inf where hidden, decay included
    values: Tensor  # ṽ (N, K, e + 1)


@dataclass(frozen=True)
class _Rows:
    """The inputs of a scan, cut into chunks on demand."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    hidden: Tensor | None
    runs: Tensor | None
    feature_map: FeatureMap
    delay: int

    @property
    def chunks(self) -> int:
        return -(-self.q.shape[1] // CHUNK)

    def queries_at(self, index: int) -> slice:
        return slice(index * CHUNK, min((index + 1) * CHUNK, self.q.shape[1]))

    def keys_at(self, index: int) -> slice:
        at = self.queries_at(index)
        return slice(max(0, at.start - self.delay), max(0, at.stop - self.delay))

    def keys(self, index: int) -> _Keys:
        at = self.keys_at(index)
        k, v = self.k[:, at], self.v[:, at]
        if self.hidden is not None:
            # Whatever stands in padding, NaN even, must not get past this line.
            mask = self.hidden[:, at, None]
            k, v = k.masked_fill(mask, 0.0), v.masked_fill(mask, 0.0)
        features, scale = self.feature_map.keys(k)
        if self.decay is not None:
            scale = torch.addcmul(scale, self.decay, self._offsets(at, self.queries_at(index).start - self.delay))
        if self.hidden is not None:
            scale = scale.masked_fill(mask, -torch.inf)
        return _Keys(at, k, features, scale, with_ones(v))

    def chunk(self, index: int, keys: _Keys, state: AttentionState) -> _Chunk:
        at = self.queries_at(index)
        fq, q_scale = self.feature_map.queries(self.q[:, at])
        size, missing = at.stop - at.start, at.stop - at.start - keys.scale.shape[1]
        seen = torch.ones(size, size - missing, dtype=torch.bool, device=fq.device).tril_(-missing)
        if self.runs is None:
            row_scale = state.log_scale.expand(len(fq), size, 1)
            if missing < size:
                so_far = keys.scale.cummax(1).values
                row_scale = torch.maximum(torch.nn.functional.pad(so_far, (0, 0, missing, 0), value=NOTHING), row_scale)
            exponent = (keys.scale.mT - row_scale).masked_fill_(~seen, -torch.inf)
            carried = torch.exp(state.log_scale - row_scale)
        else:
            seen = seen & (self.runs[:, at, None] == self.runs[:, None, keys.at])
            visible = keys.scale.mT.masked_fill(~seen, -torch.inf)  # (N, C, K)
            reads = self.runs[:, at, None] == self._run_before(index)
            row_scale = torch.where(reads, state.log_scale, NOTHING)
            if missing < size:
                row_scale = torch.maximum(visible.amax(-1, keepdim=True), row_scale)
            exponent = visible.sub_(row_scale)
            carried = torch.exp(state.log_scale - row_scale).masked_fill_(~reads, 0.0)
        weights = exponent.exp_()
        return _Chunk(at, keys.at, fq, q_scale, keys.features, keys.values, weights, row_scale, carried)

    def after(self, index: int, keys: _Keys, state: AttentionState) -> tuple[AttentionState, Tensor, Tensor]:
        """The state once this chunk's keys are in it; e^{b_j − c'} (N, K, 1) of each key; what is left of the old sums.

        The state's log-scale counts from the start of this chunk; :meth:`to_next` moves it to the next one's.
        """
        scale = keys.scale
        old = state.log_scale
        if scale.shape[1] == 0:
            return state, scale, torch.ones_like(old)
        if self.runs is not None:
            last = self.runs[:, keys.at.stop - 1, None, None]
            scale = scale.masked_fill(self.runs[:, keys.at, None] != last, -torch.inf)
            old = old.masked_fill(self._run_before(index) != last, NOTHING)
        log_scale = torch.maximum(scale.amax(1, keepdim=True), old)
        entering, left = torch.exp(scale - log_scale), torch.exp(old - log_scale)
        if self.runs is not None:
            left = left.masked_fill(self._run_before(index) != last, 0.0)
        sums = torch.baddbmm(state.sums * left, keys.features.mT, keys.values * entering)
        return AttentionState(sums, log_scale), entering, left

    def to_next(self, state: AttentionState) -> AttentionState:
        return state if self.decay is None else state.faded(-CHUNK * self.decay)

    def q_offset(self, chunk: _Chunk) -> Tensor | None:
        """What a decay adds to the log of a query's denominator: −γ(i − start + delay), (N, C, 1)."""
        if self.decay is None:
            return None
        return -self.decay * self._offsets(chunk.queries, chunk.queries.start - self.delay)

    def _run_before(self, index: int) -> Tensor:
        """The document of the state's last key, (N, 1, 1)."""
        assert self.runs is not None
        start = self.keys_at(index).start
        return self.runs[:, start - 1, None, None] if start else torch.full_like(self.runs[:, :1, None], -1)

    def _offsets(self, at: slice, start: int) -> Tensor:
        """Positions of ``at`` counted from ``start``: (1, n, 1)."""
        return torch.arange(at.start - start, at.stop - start, device=self.q.device, dtype=self.q.dtype)[None, :, None]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        hidden: Tensor | None,
        runs: Tensor | None,
        feature_map: FeatureMap,
        delay: int,
    ) -> tuple[Tensor, Tensor]:
        rows = _Rows(q, k, v, decay, hidden, runs, feature_map, delay)
        length, value_dim = v.shape[1:]
        out, lse, inverse_den = torch.empty_like(v), v.new_empty(len(v), length, 1), v.new_empty(len(v), length, 1)
        state = AttentionState.empty(len(v), feature_map.features, value_dim, like=v)
        kept = []
        for index in range(rows.chunks):
            if index % KEEP == 0 and any(ctx.needs_input_grad):
                kept += [state.sums, state.log_scale]
            keys = rows.keys(index)
            chunk = rows.chunk(index, keys, state)
            total = torch.bmm(chunk.fq, state.sums).mul_(chunk.carried)
            total.baddbmm_(torch.bmm(chunk.fq, chunk.fk.mT).mul_(chunk.weights), chunk.values)
            den = total[..., value_dim:]
            inverse_den[:, chunk.queries] = inv = inverse(den, feature_map.positive)
            out[:, chunk.queries] = total[..., :value_dim].mul_(inv)
            log_den = den.abs().log_().add_(chunk.row_scale).add_(chunk.q_scale)
            if (offset := rows.q_offset(chunk)) is not None:
                log_den += offset
            lse[:, chunk.queries] = log_den.masked_fill_(inv == 0, NOTHING)
            state = rows.to_next(rows.after(index, keys, state)[0])
        ctx.feature_map, ctx.delay = feature_map, delay
        ctx.save_for_backward(q, k, v, decay, hidden, runs, out, inverse_den, *kept)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, hidden, runs, out, inverse_den, *kept = ctx.saved_tensors
        rows = _Rows(q, k, v, decay, hidden, runs, ctx.feature_map, ctx.delay)
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_decay = None if decay is None or not ctx.needs_input_grad[3] else decay.new_zeros(decay.shape).double()
        later = AttentionState.empty(len(v), ctx.feature_map.features, v.shape[-1], like=v).sums  # R
        for first in reversed(range(0, rows.chunks, KEEP)):
            group = range(first, min(first + KEEP, rows.chunks))
            state = AttentionState(*kept[2 * (first // KEEP) : 2 * (first // KEEP) + 2])
            before, entering = [], []
            for index in group:
                keys = rows.keys(index)
                after, *enter = rows.after(index, keys, state)
                before.append((keys, state))
                entering.append(enter)
                state = rows.to_next(after)
            for index, (keys, state), (enter, left) in zip(reversed(group), reversed(before), reversed(entering)):
                chunk = rows.chunk(index, keys, state)
                at, fq, fk = chunk.queries, chunk.fq, chunk.fk
                grad = with_ones(dout[:, at])  # g
                grad[..., -1] = -(dout[:, at] * out[:, at]).sum(-1)
                if dlse is not None:
                    grad[..., -1:] += dlse[:, at]
                grad *= inverse_den[:, at]
                grad_read = grad * chunk.carried

                d_attention = torch.bmm(grad, chunk.values.mT).mul_(chunk.weights)
                dfq = torch.bmm(grad_read, state.sums.mT).baddbmm_(d_attention, fk)
                dq[:, at] = ctx.feature_map.queries_vjp(q[:, at], fq, dfq)
                if keys.scale.shape[1]:
                    attention = torch.bmm(fq, fk.mT).mul_(chunk.weights)
                    d_values = torch.bmm(fk, later).mul_(enter).baddbmm_(attention.mT, grad)
                    dfk = torch.bmm(chunk.values * enter, later.mT).baddbmm_(d_attention.mT, fq)
                    dv[:, chunk.keys] = d_values[..., :-1]
                    if d_decay is not None:
                        d_decay += _moment((dfk * fk).sum(-1, keepdim=True), chunk.keys)
                    dk[:, chunk.keys] = ctx.feature_map.keys_vjp(keys.k, fk, dfk)
                if d_decay is not None and dlse is not None:
                    d_decay -= _moment(dlse[:, at], at)
                later = torch.baddbmm(later * left, fq.mT, grad_read)
        return dq, dk, dv, None if d_decay is None else d_decay.to(v), None, None, None, None


def _moment(grad: Tensor, at: slice) -> Tensor:
    """Σ position · gradient of the log-weight, (N, 1, 1) float64: d(−γ(i − j)) taken apart into keys and queries."""
    positions = torch.arange(at.start, at.stop, device=grad.device, dtype=torch.float64)[None, :, None]
    return (grad.double() * positions).sum(1, keepdim=True)
