"""Bidirectional FAVOR+: one pass over the keys builds the state, one over the queries reads it.

    ñ_i = Sᵀφ(q_i),  S = Σ_j e^{b_j − c} φ(k_j) ṽ_jᵀ,  ṽ = [v, 1];   out_i = ñ_i[:e] / ñ_i[e]

Backward, with g_i = [dout_i, −dout_iᵀ out_i] / ñ_i[e] and R = Σ_i φ(q_i) g_iᵀ:

    dφ(q_i) = S g_i      dφ(k_j) = e^{b_j − c} R ṽ_j      dṽ_j = e^{b_j − c} Rᵀφ(k_j)

Features are computed a chunk at a time and again in the backward pass; nothing of size L × m is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longseq.attention.feature_maps import FeatureMap
from longseq.attention.scan import Gradients, Rows
from longseq.attention.state import AttentionState, inverse, widened, with_ones

# Nothing here grows with the square of a chunk: long enough for efficient products, short enough for the cache.
CHUNK = 128


# Adds up what several holders of parts of the keys, or of the queries, have; it may go on while others compute: the
# second call waits for the result.
Total = Callable[[AttentionState], Callable[[], AttentionState]]


def sum_up(
    x: Tensor, values: Tensor, last: Tensor | None, log_weight: Tensor | None, feature_map: FeatureMap
) -> AttentionState:
    """Σ_j e^{w_j} φ(x_j) [values_j, last_j]ᵀ over positions j.

    Args:
        x: (N, L, d).
        values: (N, L, e).
        last: (N, L, 1); None: ones.
        log_weight: w (N, L, 1); a position of −inf is left out, whatever stands there. None: zeros.
        feature_map: φ.
    """
    x, values = widened(x), widened(values)
    state = AttentionState.empty(len(x), feature_map.features, values.shape[-1], like=values)
    sums, scale = state.sums, state.log_scale
    for chunk in _chunks(x.shape[1]):
        part, value = x[:, chunk], values[:, chunk]
        value = with_ones(value) if last is None else torch.cat((value, last[:, chunk]), dim=-1)
        weight = None
        if log_weight is not None:
            weight = log_weight[:, chunk]
            out = weight == -torch.inf
            part, value = part.masked_fill(out, 0.0), value.masked_fill(out, 0.0)
        features, row_scale = feature_map.keys(part)
        if weight is not None:
            row_scale = row_scale + weight
        after = torch.maximum(row_scale.amax(1, keepdim=True), scale)
        sums.mul_(torch.exp(scale - after)).baddbmm_(features.mT, value * torch.exp(row_scale - after))
        scale = after
    return AttentionState(sums, scale)


def _keys(rows: Rows, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k (zeros where hidden), φ(k), log-scale (−inf where hidden) and ṽ of one chunk."""
    k, v = rows.k[:, chunk], rows.v[:, chunk]
    if rows.hidden is None:
        return k, *rows.feature_map.keys(k), with_ones(v)
    mask = rows.hidden[:, chunk, None]
    k, v = k.masked_fill(mask, 0.0), v.masked_fill(mask, 0.0)
    features, scale = rows.feature_map.keys(k)
    return k, features, scale.masked_fill(mask, -torch.inf), with_ones(v)


def bidirectional_forward(rows: Rows, total: Total | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`longseq.attention.operations.bidirectional_attention`; and what the backward pass needs.

    total: the state S of all keys from that of these, and R likewise. None: these are all.
    """
    rows = rows.widened()
    (q, k, v), feature_map, value_dim = rows.qkv, rows.feature_map, rows.v.shape[-1]
    state = AttentionState.empty(len(v), feature_map.features, value_dim, like=v)
    for chunk in _chunks(k.shape[1]):
        _, fk, scale, values = _keys(rows, chunk)
        log_scale = torch.maximum(scale.amax(1, keepdim=True), state.log_scale)
        sums = state.sums.mul_(torch.exp(state.log_scale - log_scale))
        state = AttentionState(sums.baddbmm_(fk.mT, values.mul_(torch.exp(scale - log_scale))), log_scale)
    if total is not None:
        state = total(state)()
    out, inverse_den = v.new_empty(*q.shape[:2], value_dim), v.new_empty(*q.shape[:2], 1)
    for chunk in _chunks(q.shape[1]):
        read = torch.bmm(feature_map.queries(q[:, chunk])[0], state.sums)
        inverse_den[:, chunk] = inverse(read[..., value_dim:], feature_map.positive)
        torch.mul(read[..., :value_dim], inverse_den[:, chunk], out=out[:, chunk])
    return out, (inverse_den, state.sums, state.log_scale)


def bidirectional_kept(rows: Rows) -> tuple[Tensor, ...]:
    """What :func:`bidirectional_forward` keeps, empty; also of tensors that have a shape only."""
    like, (number, _, value_dim) = widened(rows.v[:, :0, :0]), rows.v.shape
    sizes = (*rows.q.shape[:2], 1), (number, rows.feature_map.features, value_dim + 1), (number, 1, 1)
    return tuple(like.new_empty(size) for size in sizes)


def bidirectional_backward(
    rows: Rows, total: Total | None, out: Tensor, kept: Sequence[Tensor | None], dout: Tensor
) -> Gradients:
    """The gradients of q, k and v."""
    inverse_den, sums, log_scale = kept
    assert inverse_den is not None
    assert sums is not None
    assert log_scale is not None
    rows = rows.widened()
    (q, k, v), feature_map = rows.qkv, rows.feature_map
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_sums = torch.zeros_like(sums)  # R
    for chunk in _chunks(q.shape[1]):
        fq, _ = feature_map.queries(q[:, chunk])
        grad = with_ones(dout[:, chunk])  # g
        grad[..., -1] = -(dout[:, chunk] * out[:, chunk]).sum(-1)
        grad *= inverse_den[:, chunk]
        d_sums.baddbmm_(fq.mT, grad)
        dq[:, chunk] = feature_map.queries_vjp(q[:, chunk], fq, torch.bmm(grad, sums.mT))
    if total is not None:  # all have the same log-scale
        d_sums = total(AttentionState(d_sums, torch.zeros_like(log_scale)))().sums
    for chunk in _chunks(k.shape[1]):
        k_chunk, fk, scale, values = _keys(rows, chunk)
        weight = torch.exp(scale - log_scale)  # (N, C, 1)
        dk[:, chunk] = feature_map.keys_vjp(k_chunk, fk, torch.bmm(values * weight, d_sums.mT))
        torch.mul(torch.bmm(fk, d_sums)[..., :-1], weight, out=dv[:, chunk])
    return Gradients(dq, dk, dv)


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
