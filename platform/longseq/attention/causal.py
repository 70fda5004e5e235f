"""Causal FAVOR+ as a scan over chunks: linear time, one chunk of features alive at a time, forward and backward.

For query i of a chunk with running state (S, z, c) of all earlier chunks, and key log-scales b:

    M_i   = max(c, max_{j ≤ i} b_j)                       a scale that depends on no later key
    A_ij  = (φ(q_i)ᵀφ(k_j)) · exp(b_j − M_i),  j ≤ i      keys of this chunk
    out_i = (Σ_j A_ij v_j + e^{c−M_i} φ(q_i)ᵀS) / (Σ_j A_ij + e^{c−M_i} φ(q_i)ᵀz)

Backward, from the last chunk to the first, with G_i = dout_i / den_i and g_i = −(dout_iᵀ out_i) / den_i, and
(N, n) = Σ over later queries of φ(q_i) [G_i, g_i]ᵀ e^{c'−M_i}, c' the log-scale after this chunk:

    dA_ij   = (G_iᵀv_j + g_i) · exp(b_j − M_i),  j ≤ i
    dφ(q_i) = Σ_j dA_ij φ(k_j) + e^{c−M_i} (S G_i + z g_i)
    dφ(k_j) = Σ_i dA_ij φ(q_i) + e^{b_j−c'} (N v_j + n)
    dv_j    = Σ_i A_ij G_i     + e^{b_j−c'} Nᵀφ(k_j)

The states before each chunk are kept from the forward pass: rebuilding them by subtraction would drift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longseq.attention.chunks import Keys, chunks, inverse
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.state import AttentionState


def causal_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, feature_map: FeatureMap) -> Tensor:
    """Attention of each query over the keys up to its own position.

    Args:
        q, k: (N, L, d), N = batch · heads, fp32 or float64.
        v: (N, L, e), same dtype.
        hidden: (N, L) bool, True where a key is padding and must not be seen, or None.
        feature_map: the kernel.

    Returns:
        (N, L, e). A query that sees no key gets zeros.
    """
    return _CausalScan.apply(q, k, v, hidden, feature_map)


class _CausalScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, feature_map: FeatureMap) -> Tensor:
        keys = Keys(k, hidden, feature_map)
        out, inverse_den = torch.empty_like(v), v.new_empty(*v.shape[:2], 1)
        state = AttentionState.empty(len(v), feature_map.features, v.shape[-1], like=v)
        states = []  # before each chunk
        for chunk in chunks(q.shape[1]):
            fq = feature_map.queries(q[:, chunk])
            fk, scale = keys.features(chunk)
            row_scale = _row_scale(scale, state)
            attention = (fq @ fk.transpose(1, 2)).mul_(_causal_weights(scale, row_scale))  # A
            carried = torch.exp(state.log_scale - row_scale)  # (N, C, 1)
            den = attention.sum(-1, keepdim=True).addcmul_(carried, fq @ state.normaliser)
            num = torch.baddbmm((fq @ state.values).mul_(carried), attention, v[:, chunk])
            inverse_den[:, chunk] = inverse(den)
            out[:, chunk] = num.mul_(inverse_den[:, chunk])
            if any(ctx.needs_input_grad):
                states.append(state)
            state = state.merge(AttentionState.of(fk, scale, v[:, chunk]))
        ctx.feature_map = feature_map
        state_tensors = (t for s in states for t in (s.values, s.normaliser, s.log_scale))
        ctx.save_for_backward(q, k, v, hidden, out, inverse_den, *state_tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, out, inverse_den, *state_tensors = ctx.saved_tensors
        feature_map: FeatureMap = ctx.feature_map
        keys = Keys(k, hidden, feature_map)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        after = AttentionState.empty(len(v), feature_map.features, v.shape[-1], like=v)  # (N, n) and c'
        for index, chunk in reversed(list(enumerate(chunks(q.shape[1])))):
            before = AttentionState(*state_tensors[3 * index : 3 * index + 3])
            fq = feature_map.queries(q[:, chunk])
            fk, scale = keys.features(chunk)
            row_scale = _row_scale(scale, before)
            weights = _causal_weights(scale, row_scale)
            carried = torch.exp(before.log_scale - row_scale)  # (N, C, 1)
            to_later = torch.exp(scale - row_scale[:, -1:])  # (N, C, 1): e^{b − c'}

            d_num = dout[:, chunk] * inverse_den[:, chunk]  # G
            d_den = (d_num * out[:, chunk]).sum(-1, keepdim=True).neg_()  # g
            attention = (fq @ fk.transpose(1, 2)).mul_(weights)
            d_attention = torch.baddbmm(d_den, d_num, v[:, chunk].transpose(1, 2)).mul_(weights)

            dfq = torch.baddbmm(d_den * before.normaliser.mT, d_num, before.values.mT).mul_(carried)
            dfk = torch.baddbmm(after.normaliser.mT, v[:, chunk], after.values.mT).mul_(to_later)
            dq[:, chunk] = feature_map.queries_vjp(q[:, chunk], fq, dfq.baddbmm_(d_attention, fk))
            dk[:, chunk] = keys.vjp(chunk, fk, dfk.baddbmm_(d_attention.mT, fq))
            dv[:, chunk] = (fk @ after.values).mul_(to_later).baddbmm_(attention.mT, d_num)

            # c ≤ c', so the later gradients shrink as they are brought to the scale before this chunk.
            decay = torch.exp(before.log_scale - row_scale[:, -1:])
            fq_t = fq.mul_(carried).mT
            after = AttentionState(
                torch.baddbmm(after.values * decay, fq_t, d_num),
                torch.baddbmm(after.normaliser * decay, fq_t, d_den),
                before.log_scale,
            )
        return dq, dk, dv, None, None


def _row_scale(key_scale: Tensor, state: AttentionState) -> Tensor:
    """M (N, C, 1): the largest log-scale among the state's keys and those of this chunk up to each position."""
    return torch.maximum(key_scale.cummax(1).values, state.log_scale)


def _causal_weights(key_scale: Tensor, row_scale: Tensor) -> Tensor:
    """exp(b_j − M_i) for j ≤ i, else 0: (N, C, C). Masked before the exponential, where a later key may be huge."""
    exponent = key_scale.mT - row_scale
    later = torch.ones(exponent.shape[1:], dtype=torch.bool, device=exponent.device).triu_(1)
    return exponent.masked_fill_(later, -torch.inf).exp_()
