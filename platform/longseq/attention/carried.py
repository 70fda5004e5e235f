"""Causal attention a tile of the sequence at a time: the keys of earlier tiles are carried along as a state.

With w the window, a tile of positions start … start + T − 1 sees

    near  the keys less than w positions back, exactly: the tile's own and the last w before it, kept as they are
    far   all others: a scan of the keys start − w … start + T − w − 1 that begins with the state S of those before

which are disjoint, so :func:`longseq.attention.parts.combine` adds them up. The scan is that of
:mod:`longseq.attention.scan`. Behind the tile its keys have entered, S ← e^{c−γT−c'} S + Σ_j e^{b_j−c'} φ(k_j) ṽ_jᵀ.
Backward it begins with the gradient R of that S. Log-scales carry no gradient: S e^c does not depend on what c is.

A state is seen from the first key of the next tile's scan.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import backends
from longseq.attention.arguments import checked, dtypes
from longseq.attention.backends import Backend
from longseq.attention.feature_maps import FeatureMap, feature_map
from longseq.attention.first_order import Saved, first_order
from longseq.attention.functional import per_row
from longseq.attention.parts import Part, combine
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState

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
        q, k, v: (batch, heads, T, head_dim or value_dim), T at least ``window`` but for the last tile.
        state: as the tile before returned it; () before the first.
        kernel: one with features of one sign.
        features, window, far_share, decay, seed, layer, draw, projection, oprf_a, backend: as of ``favor_attention``.

    Returns:
        (batch, heads, T, value_dim) in the dtype of v, and the state behind the tile.

    Raises:
        ValueError: for a kernel with features of both signs, or a tile after one that was shorter than the window.
    """
    checked(q, k, v, True, window, features, far_share=far_share, decay=decay)
    operands, dtype = dtypes(q, k, v)
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
            operands=operands,
        )
        if not phi.positive:
            raise ValueError(
                f"kernel {kernel!r} has features of both signs and cannot share a denominator with a state"
            )
    batch, heads, length = q.shape[:3]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v_ = (t.flatten(0, 1).to(operands) for t in (q, k, v))
        rates = per_row(decay, batch, dtype)
        share = per_row(far_share, batch, dtype)
        here, halo = q, 0
        if window and state:
            halo = state[-1].shape[1]
            if halo < window:
                raise ValueError(f"a tile of {halo} positions is shorter than window={window}: only the last may be")
            k, v_ = torch.cat((state[-2], k), dim=1), torch.cat((state[-1], v_), dim=1)
            here = F.pad(q, (0, 0, halo, 0))  # a scan has a query for every key
        engine = backends.choose(backend, phi, (here, k, v_))
        parts: list[Part] = []
        behind: State = ()
        if window:
            parts.append(engine.window(here, k, v_, window=min(window, k.shape[1]), causal=True, decay=rates))
        if phi:
            sums, log_scale = (state[0], state[1].detach()) if state else (None, None)
            learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v_, rates, sums))
            out, lse, *behind_ = _Scan.apply(here, k, v_, rates, sums, log_scale, phi, window, engine, learns)
            parts.append((out, lse if share is None or not window else lse + share))
            behind = tuple(behind_)
        if window:
            behind = (*behind, k[:, -window:], v_[:, -window:])
        out = combine([(out[:, halo:], lse[:, halo:]) for out, lse in parts])[0]
    return out.view(batch, heads, length, v.shape[-1]).to(v.dtype), behind


class _Scan(torch.autograd.Function):
    """A tile's scan from the state before it: out, lse, and the state behind."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        sums: Tensor | None,
        log_scale: Tensor | None,
        phi: FeatureMap,
        delay: int,
        engine: Backend,
        learns: bool,
    ) -> tuple[Tensor, ...]:
        before = None if sums is None or log_scale is None else AttentionState(sums, log_scale)
        entering = max(0, k.shape[1] - delay)  # keys that leave the window inside the tile
        initial, log_weight, gone = before, None, before
        if decay is not None:
            distances = torch.arange(entering, 0, -1, device=k.device)[:, None]
            log_weight = -decay * distances.to(decay)
            if before is not None:  # a scan begins ``delay`` positions before its first key
                initial, gone = before.faded(decay * delay), before.faded(-decay * entering)
        done = engine.scan_forward(Rows(q, k, v, decay, None, None, phi, delay), initial, learns)
        state = engine.sum_up(k[:, :entering], v[:, :entering], None, log_weight, phi)
        state = state if gone is None else state.merge(gone)
        behind = state.sums * torch.exp(state.log_scale - done.log_scale)
        ctx.phi, ctx.delay, ctx.engine = phi, delay, engine
        ctx.save_for_backward(q, k, v, decay, done.out, done.inverse_den, *done.kept)
        ctx.mark_non_differentiable(done.log_scale)
        ctx.set_materialize_grads(False)
        return done.out, done.lse, behind, done.log_scale

    @staticmethod
    @first_order
    def backward(
        ctx: Any, saved: Saved, dout: Tensor | None, dlse: Tensor | None, later: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, decay, out, inverse_den, *kept = saved
        rows, wants = Rows(q, k, v, decay, None, None, ctx.phi, ctx.delay), ctx.needs_input_grad[3]
        grads = ctx.engine.scan_backward(rows, out, inverse_den, kept, dout, dlse, later, wants)
        d_decay = None if grads.decay is None else grads.decay.to(decay)
        d_sums = grads.initial if ctx.needs_input_grad[4] else None
        return grads.q, grads.k, grads.v, d_decay, d_sums, *[None] * 5
