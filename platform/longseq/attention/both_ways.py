"""Bidirectional attention whose weights depend on where a key is, a tile of the sequence at a time, in two passes.

What :mod:`longseq.attention.carried` does, in both directions. With w the window, the positions s … t − 1 of a tile see

    near    the keys less than w positions away, exactly: those on both sides are given beside the tile's own
    before  those further back: a scan of the keys from s − w on that begins with the state S of all before them
    behind  those further on: a scan of the reversed row, from t − 1 + max(1, w) on, that begins with the state R of all
            behind them

which are disjoint. The first pass goes from the last tile to the first and leaves R for each; the second goes forward,
carries S and reads R. Both are added up in float64: a key of millions has no more than the rounding of its tile's fp32
sum. R is seen from the first key of its scan; with forget gates from the position before its first key. No gradients.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from longseq.attention import gates
from longseq.attention.arguments import dtypes
from longseq.attention.call import Call, per_row
from longseq.attention.carried import entered
from longseq.attention.heads import lay_out
from longseq.attention.operations import scan, window_attention
from longseq.attention.options import AttentionOptions
from longseq.attention.parts import combine
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState, widened


def knows_places(options: AttentionOptions) -> bool:
    """Whether weights depend on where a key is. Else :mod:`longseq.attention.summed` has less to do."""
    return bool(options.window or options.learned_decay or options.forget_gate)


def beside(options: AttentionOptions) -> tuple[int, int]:
    """How many positions before and behind a tile belong to its q, k and v, where the sequence has so many."""
    return (options.window, max(1, options.window)) if knows_places(options) else (0, 0)


def state_behind(
    q: Tensor, k: Tensor, v: Tensor, call: Call, near: tuple[int, int], behind: AttentionState | None
) -> AttentionState | None:
    """R of the tile before this one, in float64; None without features.

    Args:
        q, k, v: (batch, heads, before + T + behind, head_dim or value_dim), of the tile and what is ``beside`` it.
        call: bidirectional, with the gates of all these positions.
        near: how many of them are before and behind the tile.
        behind: R of this tile; None for the last one.
    """
    rows = _rows(q, k, v, call)
    if rows.phi is None:
        return None
    rows = rows.at(slice(near[0], None))
    turned = _turned(rows)
    state = entered(turned, behind, call.options.backend)
    first = turned.delay  # of the keys that have entered, the nearest to the tile before
    return state.faded(rows.fade(first, first + 1)) if rows.gate is not None and first < rows.k.shape[1] else state


def attention_on_both_sides(
    near: tuple[int, int],
    before: AttentionState | None,
    behind: AttentionState | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor, AttentionState | None]:
    """Attention of a tile's queries over all keys, (batch, heads, T, value_dim), and S of the next tile, float64.

    Args:
        near, q, k, v, call: as of :func:`state_behind`.
        before, behind: S and R; None where no key is so far away.
    """
    rows, options, parts = _rows(q, k, v, call), call.options, []
    first, stop = near[0], rows.k.shape[1] - near[1]
    if options.window:
        out, lse = window_attention(rows, min(options.window, rows.k.shape[1]), False, options.backend)
        parts.append((out[:, first:stop], lse[:, first:stop]))
    if rows.phi is not None:
        share = per_row(call.far_share, len(q), dtypes(q, k, v)[1])
        forward, turned, dtype = rows.at(slice(0, stop)), _turned(rows.at(slice(first, None))), widened(rows.v).dtype
        there = scan(forward, options.backend, None if before is None else before.to(dtype))
        back = scan(turned, options.backend, None if behind is None else behind.to(dtype))
        found = [x[:, first:] for x in there], [x.flip(1)[:, : stop - first] for x in back]
        parts += [(out, lse if share is None else lse + share) for out, lse in found]
        before = entered(forward, before, options.backend)
    return lay_out(combine(parts)[0], len(q), q.shape[1], v.dtype), before


def _turned(rows: Rows) -> Rows:
    """From the last position to the first; a query's own position is the other scan's."""
    return replace(rows.reversed(), delay=max(1, rows.delay))


def _rows(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Rows:
    call.checked(q, k, v)
    if call.causal or call.options.kind != "favor":
        raise ValueError("two passes over tiles are of bidirectional favor attention")
    return call.rows(q, gates.marked(k, call.gate), v)
