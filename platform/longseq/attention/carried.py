"""Causal attention a tile of the sequence at a time: the keys of earlier tiles are carried along as a state.

With w the window, a tile of positions start … start + T − 1 sees

    near  the keys less than w positions back, exactly: the tile's own and the last w before it, kept as they are
    far   all others: a scan of the keys start − w … start + T − w − 1 that begins with the state S of those before

which are disjoint, so :func:`longseq.attention.parts.combine` adds them up. The scan is that of
:mod:`longseq.attention.scan`. Behind the tile its keys have entered, S ← e^{c−γT−c'} S + Σ_j e^{b_j−c'} φ(k_j) ṽ_jᵀ.
Backward it begins with the gradient R of that S. Log-scales carry no gradient: S e^c does not depend on what c is.

A state is seen from the first key of the next tile's scan; with forget gates from the last key that is in it.

However long the sequence, a tile's keys are summed up by themselves. ``wide`` also adds these sums to those of earlier
tiles in float64: a key of millions has no more than the rounding of its tile's fp32 sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import gates
from longseq.attention.arguments import dtypes
from longseq.attention.backends.choice import choose
from longseq.attention.call import Call, per_row
from longseq.attention.heads import lay_out
from longseq.attention.isolation import Inputs, Sight, isolated
from longseq.attention.operations import carried_scan, scan, window_attention
from longseq.attention.parts import combine
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState, widened

# S (N, m, e + 1) and c (N, 1, 1), unless features = 0; with a window the last w k and v, and with gates their log f
State = tuple[Tensor, ...]


def carried_attention(
    q: Tensor, k: Tensor, v: Tensor, state: State, call: Call, *, wide: bool = False
) -> tuple[Tensor, State]:
    """What causal :func:`longseq.attention.favor_attention` gives for one tile of a sequence, with gradients.

    Args:
        q, k, v: (batch, heads, T, head_dim or value_dim), T at least the window but for the last tile.
        state: as the tile before returned it; () before the first.
        call: the tile is causal in any case.
        wide: keep the state's sums in float64. For sequences of any length; without gradients.

    Returns:
        (batch, heads, T, value_dim) in the dtype of v, and the state behind the tile.

    Raises:
        ValueError: for a tile after one that was shorter than the window.
    """
    call, options, (batch, heads) = replace(call, causal=True), call.options, q.shape[:2]
    call.checked(q, k, v)
    k = gates.marked(k, call.gate)
    with torch.autocast(q.device.type, enabled=False):
        tile, halo, window, gate = call.rows(q, k, v), 0, options.window, None
        if call.gate is not None:
            gate = call.gate.flatten(0, 1)[..., None]
        share = per_row(call.far_share, batch, dtypes(q, k, v)[1])
        if window and state:
            recent = state[2 * bool(tile.phi) :]
            halo = recent[0].shape[1]
            if halo < window:
                raise ValueError(f"a tile of {halo} positions is shorter than window={window}: only the last may be")
            keys, values = torch.cat((recent[0], tile.k), dim=1), torch.cat((recent[1], tile.v), dim=1)
            tile = replace(tile, q=F.pad(tile.q, (0, 0, halo, 0)), k=keys, v=values)  # a scan has a query for every key
            if gate is not None:
                gate = torch.cat((recent[2], gate), dim=1)
                tile = replace(tile, gate=gates.running(gate[..., 0]))
        behind: State = ()
        length, again = tile.k.shape[1], False

        def attend(inputs: Inputs) -> Tensor:
            nonlocal behind, again
            q, k, v, *earlier = inputs
            rows, parts = replace(tile, q=q, k=k, v=v), []
            if window:
                parts.append(window_attention(rows, min(window, length), True, options.backend))
            if rows.phi:
                before = AttentionState(earlier[0], state[1].detach()) if state else None
                out, lse, after = (_wide_scan if wide else carried_scan)(rows, before, options.backend)
                parts.append((out, lse if share is None or not window else lse + share))
                sums = after.sums
                if again:  # without the keys that are NaN, which all queries of later tiles will see
                    entered = tile.at(slice(0, max(0, length - window)))
                    bad = ~(entered.k.isfinite().all((1, 2)) & entered.v.isfinite().all((1, 2)))
                    sums = sums.masked_fill(bad[:, None, None], torch.nan)
                behind = sums, after.log_scale
            again = True
            return combine(parts)[0]

        inputs = (*tile.qkv, *([state[0]] if tile.phi and state else []))
        out = isolated(attend, inputs, None, Sight(lambda: None, True, 0 if tile.phi else window))[:, halo:]
        if window:
            kept = (tile.k, tile.v) if gate is None else (tile.k, tile.v, gate)
            behind = (*behind, *(x[:, -window:].clone() for x in kept))  # a view would keep all of the tile
    return lay_out(out, batch, heads, v.dtype), behind


def _wide_scan(rows: Rows, before: AttentionState | None, backend: str) -> tuple[Tensor, Tensor, AttentionState]:
    """As :func:`longseq.attention.operations.carried_scan`, with states in float64 and without gradients."""
    out, lse = scan(rows, backend, None if before is None else before.to(widened(rows.v).dtype))
    return out, lse, entered(rows, before, backend)


def entered(rows: Rows, before: AttentionState | None, backend: str) -> AttentionState:
    """The state behind a scan of ``rows``, in float64: that before, and all keys but those in the last ``delay``."""
    entering = max(0, rows.k.shape[1] - rows.delay)
    engine = choose(backend, rows.phi, rows.qkv)
    behind = engine.state(rows.at(slice(0, entering))).double()
    if before is not None:
        fade = rows.fade(0, entering) if rows.decay is None else -rows.decay.double() * entering
        behind = behind.merge(before.faded(fade))
    return behind
