"""Decoding: causal attention one token at a time, from a state whose size does not depend on the length.

The state holds what later queries need of the keys so far: the last ``window`` of them as they are, and all older
ones as the sums of the scan (:mod:`longseq.attention.scan`). With position t, S and c the sums and their log-scale,
ṽ = [v, 1], w the window and γ the decay, a step is

    c ← c − γ,   S ← S + φ(k_{t−w}) ṽ_{t−w}ᵀ           the key that is w positions back leaves the window
    s_j = q_tᵀk_j/√d − γ(t − j),   t − w < j ≤ t        scores of the recent keys
    ñ   = Σ_j e^{s_j} ṽ_j + e^{c + share} Sᵀφ(q_t)      out = ñ[:e] / ñ[e]

every exponential relative to the largest. A forget gate takes the place of −γ: each step its own position's log f.
Exact attention is the same step with a window that never ends: there the state is a key-value cache, and grows.

Sums, scores and state are fp32 whatever the inputs' dtype (float64 for float64 inputs), as in
:func:`longseq.attention.favor_attention`. No gradients flow through any of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longseq.attention import gates
from longseq.attention.arguments import dtypes, floating
from longseq.attention.backends.choice import choose
from longseq.attention.call import Call, per_row
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.functional import attention
from longseq.attention.scan import Rows
from longseq.attention.state import AttentionState, inverse, with_ones


@dataclass(frozen=True, eq=False)
class Recent:
    """Keys that have not been summed up yet, oldest first, for each of N = batch · heads rows.

    Attributes:
        k: (N, w, d).
        values: [v, 1], (N, w, e + 1).
        log_weight: (N, 1, w), what is added to a key's score: −γ · its distance from the last position, or what gates
            have forgotten since, and −inf where there is no key, or a hidden one.
        rolling: whether the oldest key leaves for every one that comes.
    """

    k: Tensor
    values: Tensor
    log_weight: Tensor
    rolling: bool


@dataclass(frozen=True, eq=False)
class Far:
    """Keys beyond the window, summed up.

    Attributes:
        state: Σ φ(k) [v, 1]ᵀ, with its log-scale as seen from the last position.
        feature_map: the kernel φ.
        share: log-factor of every weight, (N, 1, 1), or None.
    """

    state: AttentionState
    feature_map: FeatureMap
    share: Tensor | None

    def absorbed(self, k: Tensor, values: Tensor, log_weight: Tensor | None, decay: Tensor | None) -> Far:
        """One position later, and with one key more, k (N, 1, d). A ``log_weight`` of −inf leaves it out."""
        features, scale = self.feature_map.keys(k)
        if log_weight is not None:
            scale += log_weight
        before = self.state.log_scale if decay is None else self.state.log_scale - decay
        log_scale = torch.maximum(before, scale)
        sums = self.state.sums * torch.exp(before - log_scale)
        sums.baddbmm_(features.mT, values * scale.sub_(log_scale).exp_())
        return Far(AttentionState(sums, log_scale), self.feature_map, self.share)


@dataclass(frozen=True, eq=False)
class RecurrentState:
    """All that decoding must know of the past, and of the attention that it goes on with.

    :func:`decode` leaves the state it is given as it was and returns another, so one state can be continued many times.

    Attributes:
        far: the keys beyond the window. None: none of them is seen.
        recent: the keys inside the window. None: there is no window.
        decay: γ of each row, (N, 1, 1), or None.
        gated: whether every position has a forget gate in its place.
        shape: (batch, heads, head_dim, value_dim); N = batch · heads.
        dtype: of everything it holds, but for ``before``.
        before: what the module's short convolution needs of the last positions, (batch, width − 1, 3E), or None.
    """

    far: Far | None
    recent: Recent | None
    decay: Tensor | None
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    before: Tensor | None = None
    gated: bool = False

    def select(self, sequences: Tensor) -> RecurrentState:
        """The state of other sequences of the batch, in another order, or one several times.

        Args:
            sequences: (new batch,) indices into the batch. ``torch.tensor([0, 0, 0])`` makes three of the first.
        """
        heads = self.shape[1]
        rows = (sequences[:, None] * heads + torch.arange(heads, device=sequences.device)).flatten()
        far, recent, decay = self.far, self.recent, self.decay
        if far is not None:
            state = AttentionState(far.state.sums[rows], far.state.log_scale[rows])
            far = Far(state, far.feature_map, None if far.share is None else far.share[rows])
        if recent is not None:
            recent = Recent(recent.k[rows], recent.values[rows], recent.log_weight[rows], recent.rolling)
        decay = None if decay is None else decay[rows]
        before = None if self.before is None else self.before[sequences]
        shape = (len(sequences), *self.shape[1:])
        return replace(self, far=far, recent=recent, decay=decay, shape=shape, before=before)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, key_padding: Tensor | None = None, **options: Any
) -> tuple[Tensor, RecurrentState]:
    """Read a prompt: causal FAVOR+ attention over it, and the state to go on from.

    Args:
        q, k, v: (batch, heads, length, head_dim or value_dim). A length of 0 gives the state of an empty prompt.
        key_padding: (batch, length) bool, False hides a key now and later. Hidden positions count as positions: bring
            prompts of several lengths to one by padding in front.
        causal: must be True.
        options: kernel, features, window (the size of the state grows with it), far_share, decay, gate, seed, layer,
            draw, projection, oprf_a and backend, as of :func:`longseq.attention.favor_attention`. The state keeps them
            for :func:`decode`, which is given the gates of its own positions.

    Returns:
        (batch, heads, length, value_dim) in the dtype of v, and the state.

    Raises:
        ValueError: if not causal, and as :func:`longseq.attention.favor_attention` does.
    """
    return read(q, k, v, Call.of(causal=causal, **options), key_padding)


def prefill_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    key_padding: Tensor | None = None,
    decay: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, RecurrentState]:
    """:func:`prefill` for exact attention: the state keeps all keys and values, and grows with every token."""
    return read(q, k, v, Call.of(kind="exact", causal=causal, decay=decay, gate=gate), key_padding)


@torch.no_grad()
def read(
    q: Tensor, k: Tensor, v: Tensor, call: Call, key_padding: Tensor | None = None
) -> tuple[Tensor, RecurrentState]:
    """:func:`prefill` and :func:`prefill_exact` with their options as one."""
    if not call.causal:
        raise ValueError(
            "bidirectional attention cannot be decoded token by token, as every new key would change all earlier "
            "outputs; use causal attention"
        )
    k = gates.marked(k, call.gate)
    out = attention(q, k, v, call, key_padding)
    exact, window, dtype = call.options.kind == "exact", call.options.window, dtypes(q, k, v)[1]
    state = None
    with torch.autocast(q.device.type, enabled=False):
        rows = call.rows(q, k, v, key_padding)
        rows = replace(rows, k=rows.k.to(dtype), v=rows.v.to(dtype))
        if rows.phi is not None:
            # By PyTorch, whose features of bf16 keys are not rounded.
            state = choose("torch", rows.phi, rows.qkv).state(rows.at(slice(0, max(0, k.shape[2] - window))))
    shape = *k.shape[:2], k.shape[3], v.shape[3]
    return out, _behind(rows, state, call, shape, dtype, k.shape[2] if exact else window)


def following(carried: tuple[Tensor, ...], none: Tensor, call: Call) -> RecurrentState:
    """What decoding goes on with behind the tiles of :mod:`longseq.attention.carried`.

    Args:
        carried: as the last tile returned it.
        none: (batch, heads, 0, head_dim), of the values' dtype.
        call: as of the tiles.
    """
    batch, heads, _, head_dim = none.shape
    rows, window, dtype = call.rows(none, none, none), call.options.window, dtypes(none, none, none)[1]
    if window:
        k, v, *gate = carried[2 * (rows.phi is not None) :]
        sums = gates.running(gate[0][..., 0]) if gate else None
        rows = replace(rows, k=k.to(dtype), v=v.to(dtype), gate=sums)
    state = None if rows.phi is None else AttentionState(carried[0], carried[1]).to(dtype)
    return _behind(rows, state, call, (batch, heads, head_dim, head_dim), dtype, window)


def _behind(
    rows: Rows,
    state: AttentionState | None,
    call: Call,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    size: int,
) -> RecurrentState:
    """The state after the last of ``rows``: ``size`` of them as they are, and the sums of those before."""
    far, exact, length = None, call.options.kind == "exact", rows.k.shape[1]
    if state is not None and rows.phi is not None:
        if rows.decay is not None:  # from behind the last key that entered to the last position
            state = state.faded(-rows.decay * (call.options.window - 1))
        if rows.gate is not None:  # from the last key that entered
            state = state.faded(rows.fade(max(0, length - size), length))
        far = Far(state, rows.phi, per_row(call.far_share, shape[0], dtype))
    recent = _last(rows, size, rolling=not exact) if exact or size else None
    gated = call.options.forget_gate or call.gate is not None
    return RecurrentState(far, recent, rows.decay, shape, dtype, gated=gated)


@torch.no_grad()
def decode(
    q: Tensor, k: Tensor, v: Tensor, state: RecurrentState, gate: Tensor | None = None
) -> tuple[Tensor, RecurrentState]:
    """Attention of the next position, or the next few one after the other.

    Args:
        q, k, v: (batch, heads, positions, head_dim or value_dim), batch and heads as of the prompt.
        state: of all positions before. It is not changed.
        gate: (batch, heads, positions) log f, if the prompt had gates.

    Returns:
        (batch, heads, positions, value_dim) in the dtype of v, what :func:`longseq.attention.favor_attention` gives for
        these positions of the whole sequence; and the state after them.

    Raises:
        ValueError: for shapes that are not those of the prompt.
    """
    floating(q=q, k=k, v=v)
    batch, heads, head_dim, value_dim = state.shape
    if (
        q.ndim != 4
        or q.shape != (batch, heads, q.shape[2], head_dim)
        or k.shape != q.shape
        or v.shape != (*q.shape[:3], value_dim)
    ):
        raise ValueError(
            f"the state continues with q and k of shape {(batch, heads, 'positions', head_dim)} and v with {value_dim} "
            f"at the end; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if (gate is not None) != state.gated or (gate is not None and gate.shape != q.shape[:3]):
        raise ValueError(
            f"the state {'continues' if state.gated else 'has begun without gates, and continues'} with "
            f"{f'a gate of shape {tuple(q.shape[:3])}' if state.gated else 'none'}; "
            f"got {None if gate is None else tuple(gate.shape)}"
        )
    k = gates.marked(k, gate)
    fades = None if gate is None else gates.running(gate.flatten(0, 1)).diff(dim=1).to(state.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q_rows, k_rows, v_rows = (t.flatten(0, 1).to(state.dtype) for t in (q, k, v))
        outs = []
        for at in range(q.shape[2]):
            now = slice(at, at + 1)
            decay = state.decay if fades is None else -fades[:, now]
            out, state = _step(q_rows[:, now], k_rows[:, now], v_rows[:, now], state, decay)
            outs.append(out)
    if not outs:
        return v, state
    return torch.cat(outs, dim=1).view(v.shape).to(v.dtype), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, state: RecurrentState, decay: Tensor | None
) -> tuple[Tensor, RecurrentState]:
    """One position; q, k (N, 1, d), v (N, 1, e); decay (N, 1, 1), what it takes from all weights before it."""
    far, recent, values = state.far, state.recent, with_ones(v)
    if recent is None:
        assert far is not None
        far = far.absorbed(k, values, None, decay)
        total = torch.bmm(far.feature_map.queries(q)[0], far.state.sums)
        out = total[..., :-1] * inverse(total[..., -1:], far.feature_map.positive)
        return out, replace(state, far=far)

    leaving = int(recent.rolling)
    log_weight = recent.log_weight if decay is None else recent.log_weight - decay
    if far is not None:
        far = far.absorbed(recent.k[:, :1], recent.values[:, :1], log_weight[..., :1], decay)
    recent = Recent(
        torch.cat((recent.k[:, leaving:], k), dim=1),
        torch.cat((recent.values[:, leaving:], values), dim=1),
        torch.cat((log_weight[..., leaving:], log_weight.new_zeros(len(q), 1, 1)), dim=-1),
        recent.rolling,
    )
    scores = torch.baddbmm(recent.log_weight, q, recent.k.mT, alpha=q.shape[-1] ** -0.5)  # s (N, 1, w)
    top = scores.amax(-1, keepdim=True)
    if far is None:
        total = torch.bmm(scores.sub_(top).exp_(), recent.values)  # ñ (N, 1, e + 1)
    else:
        fq, far_top = far.feature_map.queries(q)
        far_top += far.state.log_scale
        if far.share is not None:
            far_top += far.share
        top = torch.maximum(top, far_top)
        total = torch.bmm(fq, far.state.sums).mul_(far_top.sub_(top).exp_())
        total.baddbmm_(scores.sub_(top).exp_(), recent.values)
    out = total[..., :-1] / total[..., -1:]
    return out, replace(state, far=far, recent=recent)


def _last(rows: Rows, size: int, rolling: bool) -> Recent:
    """The last ``size`` keys; in front of them empty places where there are fewer."""
    k, v, length = rows.k, rows.v, rows.k.shape[1]
    log_weight = k.new_zeros(*k.shape[:2], 1)
    if rows.decay is not None:
        log_weight = log_weight - rows.decay * torch.arange(length - 1, -1, -1, device=k.device)[:, None]
    if rows.gate is not None:
        log_weight = log_weight + (rows.gate[:, -1:] - rows.gate[:, 1:]).to(k.dtype)
    if rows.hidden is not None:  # whatever stands in padding, NaN even, must not get past this line
        hidden = rows.hidden[..., None]
        k, v, log_weight = (
            k.masked_fill(hidden, 0.0),
            v.masked_fill(hidden, 0.0),
            log_weight.masked_fill(hidden, -torch.inf),
        )
    missing = max(0, size - length)

    def last(x: Tensor, filling: float) -> Tensor:
        x = x[:, x.shape[1] + missing - size :]
        return torch.cat((x.new_full((len(x), missing, x.shape[2]), filling), x), dim=1)

    return Recent(last(k, 0.0), last(with_ones(v), 0.0), last(log_weight, -torch.inf).mT.contiguous(), rolling)
