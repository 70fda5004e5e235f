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

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.arguments import checked, dtypes
from longseq.attention.feature_maps import feature_map
from longseq.attention.functional import per_row
from longseq.attention.heads import lay_out
from longseq.attention.isolation import Inputs, Sight, isolated
from longseq.attention.parts import Part, combine
from longseq.attention.scan_operator import carried_scan
from longseq.attention.state import AttentionState
from longseq.attention.window_operator import window_attention

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
    batch, heads = q.shape[:2]
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (t.flatten(0, 1).to(operands) for t in (q, k, v))
        rates = per_row(decay, batch, dtype)
        share = per_row(far_share, batch, dtype)
        here, halo = queries, 0
        if window and state:
            halo = state[-1].shape[1]
            if halo < window:
                raise ValueError(f"a tile of {halo} positions is shorter than window={window}: only the last may be")
            keys, values = torch.cat((state[-2], keys), dim=1), torch.cat((state[-1], values), dim=1)
            here = F.pad(queries, (0, 0, halo, 0))  # a scan has a query for every key
        behind: State = ()
        entering, again = max(0, keys.shape[1] - window), False

        def attend(rows: Inputs) -> Tensor:
            nonlocal behind, again
            q, k, v, *earlier = rows
            parts: list[Part] = []
            if window:
                near = min(window, k.shape[1])
                parts.append(
                    window_attention(q, k, v, window=near, causal=True, decay=rates, backend=backend, beyond=phi)
                )
            if phi:
                before = AttentionState(earlier[0], state[1].detach()) if state else None
                out, lse, after = carried_scan(q, k, v, phi, before, delay=window, decay=rates, backend=backend)
                parts.append((out, lse if share is None or not window else lse + share))
                sums = after.sums
                if again:  # without the keys that are NaN, which all queries of later tiles will see
                    bad = ~(keys[:, :entering].isfinite().all((1, 2)) & values[:, :entering].isfinite().all((1, 2)))
                    sums = sums.masked_fill(bad[:, None, None], torch.nan)
                behind = sums, after.log_scale
            again = True
            return combine(parts)[0]

        rows = (here, keys, values, *([state[0]] if phi and state else []))
        out = isolated(attend, rows, None, Sight(lambda: None, True, 0 if phi else window))[:, halo:]
        if window:
            behind = (*behind, keys[:, -window:], values[:, -window:])
    return lay_out(out, batch, heads, v.dtype), behind
