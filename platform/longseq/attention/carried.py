"""Causal attention a tile of the sequence at a time: the keys of earlier tiles are carried along as a state.

With w the window, a tile of positions start … start + T − 1 sees

    near    the keys less than w positions back, exactly: the tile's own and the last w before it, kept as they are
    far     keys of those two that are w positions back or more, by the scan
    carried all keys before start − w, as their state S with log-scale c (see :mod:`longseq.attention.state`)

which are disjoint, so :func:`longseq.attention.parts.combine` adds them up. For queries φ(q_i) the carried part is

    ñ_i = Sᵀφ(q_i),  out_i = ñ_i[:e] / ñ_i[e],  lse_i = log ñ_i[e] + c − γ(i − start + w + 1)

and behind the tile T further keys j have entered: S ← e^{c − γT − c'} S + Σ_j e^{b_j − c'} φ(k_j) ṽ_jᵀ, with the
largest of these exponents as c' and b_j the log-scale of φ(k_j), less γ times the distance to the last of them.
Backward, with g as in the scan and R the gradient of S behind the tile:

    dφ(q_i) = S g_i        dS += φ(q_i) g_iᵀ + e^{c − γT − c'} R
    dφ(k_j) = e^{b_j−c'} R ṽ_j       dṽ_j = e^{b_j−c'} Rᵀφ(k_j)

Log-scales carry no gradient: S e^c does not depend on what c is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longseq.attention import backends
from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.attention.parts import Part, combine
from longseq.attention.state import NOTHING, AttentionState, in_full_precision, inverse, with_ones

# Positions whose features exist at a time.
_CHUNK = 256

State = tuple[Tensor, ...]  # S (N, m, e + 1) and c (N, 1, 1), unless features = 0; with a window the last w k and v


def carried_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    kernel: str = "softmax",
    features: int = 256,
    window: int = 0,
    far_share: Tensor | None = None,
    decay: Tensor | None = None,
    seed: int = 0,
    layer: int = 0,
    draw: int = 0,
    projection: str = "orthogonal",
    oprf_a: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """What causal :func:`longseq.attention.favor_attention` gives for one tile of a sequence, with gradients.

    Args:
        q, k, v: (batch, heads, T, head_dim or value_dim), T above ``window`` but for the last tile.
        state: as the tile before returned it; () before the first.
        kernel: one with features of one sign.
        features, window, far_share, decay, seed, layer, draw, projection, oprf_a, backend: as of ``favor_attention``.

    Returns:
        (batch, heads, T, value_dim) in the dtype of v, and the state behind the tile.

    Raises:
        ValueError: for a kernel with features of both signs.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    phi = None
    if features or not window:
        phi = feature_map(
            kernel,
            features,
            q.shape[-1],
            seed=seed,
            layer=layer,
            draw=draw,
            projection=projection,
            oprf_a=oprf_a,
            device=q.device,
            dtype=dtype,
        )
        if not phi.positive:
            raise ValueError(
                f"kernel {kernel!r} has features of both signs and cannot share a denominator with a state"
            )
    batch, heads, length = q.shape[:3]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v_ = (t.flatten(0, 1).to(dtype) for t in (q, k, v))
        rates = None if decay is None else decay.to(dtype).repeat(batch).view(-1, 1, 1)
        share = None if far_share is None else far_share.to(dtype).repeat(batch).view(-1, 1, 1)
        here = q
        halo = 0
        if window and state:
            halo = state[-1].shape[1]
            k, v_ = torch.cat((state[-2], k), dim=1), torch.cat((state[-1], v_), dim=1)
            here = F.pad(q, (0, 0, halo, 0))  # a scan has a query for every key
        engine = backends.choose(backend, phi, (here, k, v_))
        near: list[Part] = []
        far: list[Part] = []
        if window:
            near.append(engine.window(here, k, v_, window=min(window, k.shape[1]), causal=True, decay=rates))
        if phi and window < k.shape[1]:
            far.append(engine.scan(here, k, v_, phi, delay=window, decay=rates))
        if halo:
            near, far = ([(out[:, halo:], lse[:, halo:]) for out, lse in parts] for parts in (near, far))
        if phi and state:
            out, lse = _Read.apply(q, state[0], state[1].detach(), phi)
            if rates is not None:
                lse = lse - _distances(rates, window + 1, length)
            far.append((out, lse))
        if near and share is not None:
            far = [(out, lse + share) for out, lse in far]
        out = combine(near + far)[0]
        behind: State = ()
        if phi:
            entering = k.shape[1] - window
            behind = _absorb(k[:, :entering], v_[:, :entering], state, phi, rates)
        if window:
            behind = (*behind, k[:, -window:], v_[:, -window:])
    return out.view(batch, heads, length, v.shape[-1]).to(v.dtype), behind


def _absorb(k: Tensor, v: Tensor, state: State, phi: FeatureMap, rates: Tensor | None) -> State:
    """S and c with these keys, as seen from the last of them."""
    if state:
        sums, log_scale = state[0], state[1].detach()
    else:
        empty = AttentionState.empty(len(v), phi.features, v.shape[-1], like=v)
        sums, log_scale = empty.sums, empty.log_scale
    log_weight = None
    if rates is not None:
        log_weight = -_distances(rates, 0, k.shape[1]).flip(1)
        log_scale = log_scale - rates * k.shape[1]
    return _Absorb.apply(k, v, log_weight, sums, log_scale, phi)


def _distances(rates: Tensor, first: int, count: int) -> Tensor:
    """γ · distance for ``count`` distances, (N, count, 1). In float64 up to here: γ's gradient is a sum of large terms
    that nearly cancel."""
    positions = torch.arange(first, first + count, device=rates.device, dtype=torch.float64)
    return (rates.double() * positions[:, None]).to(rates.dtype)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, sums: Tensor, log_scale: Tensor, phi: FeatureMap) -> Part:
        out, lse, inverse_den = q.new_empty(*q.shape[:2], sums.shape[-1] - 1), q[..., :1].clone(), q[..., :1].clone()
        for chunk in _chunks(q.shape[1]):
            fq, scale = phi.queries(q[:, chunk])
            total = torch.bmm(fq, sums)
            den = total[..., -1:]
            inv = inverse(den, phi.positive)
            inverse_den[:, chunk] = inv
            torch.mul(total[..., :-1], inv, out=out[:, chunk])
            lse[:, chunk] = den.log().add_(scale).add_(log_scale).masked_fill_(inv == 0, NOTHING)
        ctx.phi = phi
        ctx.save_for_backward(q, sums, out, inverse_den)
        return out, lse

    @staticmethod
    @in_full_precision
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, sums, out, inverse_den = ctx.saved_tensors
        dq, d_sums = torch.empty_like(q), torch.zeros_like(sums)
        for chunk in _chunks(q.shape[1]):
            fq, _ = ctx.phi.queries(q[:, chunk])
            grad = with_ones(dout[:, chunk])  # g
            grad[..., -1:] = dlse[:, chunk] - (dout[:, chunk] * out[:, chunk]).sum(-1, keepdim=True)
            grad *= inverse_den[:, chunk]
            d_sums.baddbmm_(fq.mT, grad)
            dq[:, chunk] = ctx.phi.queries_vjp(q[:, chunk], fq, torch.bmm(grad, sums.mT))
        return dq, d_sums, None, None


class _Absorb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, log_weight: Tensor | None, sums: Tensor, log_scale: Tensor, phi: FeatureMap
    ) -> tuple[Tensor, Tensor]:
        before = AttentionState(sums, log_scale)
        state = before
        for chunk in _chunks(k.shape[1]):
            features, scale = phi.keys(k[:, chunk])
            scale = scale if log_weight is None else scale + log_weight[:, chunk]
            state = state.merge(AttentionState.of(features, scale, with_ones(v[:, chunk])))
        ctx.phi = phi
        ctx.save_for_backward(k, v, log_weight, sums, log_scale, state.log_scale)
        ctx.mark_non_differentiable(state.log_scale)
        return state.sums, state.log_scale

    @staticmethod
    @in_full_precision
    @once_differentiable
    def backward(ctx: Any, later: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_weight, sums, before, after = ctx.saved_tensors
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        d_weight = None if log_weight is None else torch.empty_like(log_weight)
        for chunk in _chunks(k.shape[1]):
            fk, scale = ctx.phi.keys(k[:, chunk])
            scale = scale if log_weight is None else scale + log_weight[:, chunk]
            weight = torch.exp(scale - after)  # (N, C, 1)
            d_features = torch.bmm(with_ones(v[:, chunk]) * weight, later.mT)
            if d_weight is not None:
                d_weight[:, chunk] = (d_features * fk).sum(-1, keepdim=True)
            torch.mul(torch.bmm(fk, later)[..., :-1], weight, out=dv[:, chunk])
            dk[:, chunk] = ctx.phi.keys_vjp(k[:, chunk], fk, d_features)
        left = torch.exp(before - after)
        d_before = (later * sums).sum((1, 2), keepdim=True) * left if ctx.needs_input_grad[4] else None
        return dk, dv, d_weight, later * left, d_before, None


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK)]
