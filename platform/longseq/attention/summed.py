"""Bidirectional attention a tile of the sequence at a time, in two passes: sums of all keys, then queries read them.

Out of :mod:`longseq.attention.bidirectional`, whose sum S over all keys needs no order. The sums of the tiles are added
up in float64: however many there are, S has no more than the rounding of a tile's fp32 sum. What windows, decays and
gates see of where a key is has :mod:`longseq.attention.both_ways`. No gradients.
"""

from __future__ import annotations

from torch import Tensor

from longseq.attention.backends.choice import choose
from longseq.attention.call import Call
from longseq.attention.heads import lay_out
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState, widened


def sum_of_keys(q: Tensor, k: Tensor, v: Tensor, call: Call) -> AttentionState:
    """Σ φ(k_j) [v_j, 1]ᵀ of a tile, float64; tiles are put together by :meth:`AttentionState.merge`.

    Args:
        q, k, v: (batch, heads, T, head_dim or value_dim).
        call: bidirectional.

    Raises:
        ValueError: for a window, a decay or a gate, and as :func:`longseq.attention.favor_attention` does.
    """
    rows = _rows(q, k, v, call)
    return choose(call.options.backend, rows.phi, rows.qkv).state(rows).double()


def attention_to_sums(sums: AttentionState, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Attention of a tile's queries over all keys that ``sums`` are made of: (batch, heads, T, value_dim)."""
    rows = _rows(q, k, v, call)
    narrow = sums.to(widened(rows.v).dtype)
    # Of the backend's own sums of these keys nothing is used.
    out, _ = choose(call.options.backend, rows.phi, rows.qkv).bidirectional_forward(rows, lambda _: lambda: narrow)
    return lay_out(out, len(q), q.shape[1], v.dtype)


def _rows(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Rows:
    call.checked(q, k, v)
    if (
        call.causal
        or call.options.kind != "favor"
        or call.options.window
        or call.decay is not None
        or call.gate is not None
    ):
        raise ValueError(
            "sums of all keys know no order: attention must be favor, bidirectional, without window, decay and gate"
        )
    return call.rows(q, k, v)
