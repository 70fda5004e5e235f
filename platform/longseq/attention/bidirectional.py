"""Bidirectional FAVOR+: one pass over the keys builds the state, one over the queries reads it.

    out_i = φ(q_i)ᵀS / φ(q_i)ᵀz,   (S, z) = Σ_j e^{b_j − c} φ(k_j) [v_j, 1]ᵀ

Backward, with G_i = dout_i / den_i, g_i = −(dout_iᵀ out_i) / den_i and (N, n) = Σ_i φ(q_i) [G_i, g_i]ᵀ:

    dφ(q_i) = S G_i + z g_i      dφ(k_j) = e^{b_j − c} (N v_j + n)      dv_j = e^{b_j − c} Nᵀφ(k_j)

Features are computed a chunk at a time and again in the backward pass; nothing of size L × m is held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longseq.attention.chunks import Keys, chunks, inverse
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.state import AttentionState


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, feature_map: FeatureMap) -> Tensor:
    """Attention of each query over all keys that are not hidden.

    Args:
        q: (N, Lq, d), N = batch · heads, fp32 or float64.
        k: (N, L, d), same dtype.
        v: (N, L, e), same dtype.
        hidden: (N, L) bool, True where a key is padding and must not be seen, or None.
        feature_map: the kernel.

    Returns:
        (N, Lq, e); zeros where every key is hidden.
    """
    return _TwoPasses.apply(q, k, v, hidden, feature_map)


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, feature_map: FeatureMap) -> Tensor:
        keys = Keys(k, hidden, feature_map)
        state = AttentionState.empty(len(v), feature_map.features, v.shape[-1], like=v)
        for chunk in chunks(k.shape[1]):
            state = state.merge(AttentionState.of(*keys.features(chunk), v[:, chunk]))
        out, inverse_den = v.new_empty(*q.shape[:2], v.shape[-1]), v.new_empty(*q.shape[:2], 1)
        for chunk in chunks(q.shape[1]):
            fq = feature_map.queries(q[:, chunk])
            inverse_den[:, chunk] = inverse(fq @ state.normaliser)
            out[:, chunk] = (fq @ state.values).mul_(inverse_den[:, chunk])
        ctx.feature_map = feature_map
        ctx.save_for_backward(q, k, v, hidden, out, inverse_den, state.values, state.normaliser, state.log_scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, out, inverse_den, *state = ctx.saved_tensors
        feature_map: FeatureMap = ctx.feature_map
        keys, (values, normaliser, log_scale) = Keys(k, hidden, feature_map), state
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_values, d_normaliser = torch.zeros_like(values), torch.zeros_like(normaliser)  # N, n
        for chunk in chunks(q.shape[1]):
            fq = feature_map.queries(q[:, chunk])
            d_num = dout[:, chunk] * inverse_den[:, chunk]  # G
            d_den = (d_num * out[:, chunk]).sum(-1, keepdim=True).neg_()  # g
            d_values.baddbmm_(fq.mT, d_num)
            d_normaliser.baddbmm_(fq.mT, d_den)
            dfq = torch.baddbmm(d_den * normaliser.mT, d_num, values.mT)
            dq[:, chunk] = feature_map.queries_vjp(q[:, chunk], fq, dfq)
        for chunk in chunks(k.shape[1]):
            fk, scale = keys.features(chunk)
            weight = torch.exp(scale - log_scale)  # (N, C, 1)
            dfk = torch.baddbmm(d_normaliser.mT, v[:, chunk], d_values.mT).mul_(weight)
            dk[:, chunk] = keys.vjp(chunk, fk, dfk)
            dv[:, chunk] = (fk @ d_values).mul_(weight)
        return dq, dk, dv, None, None
