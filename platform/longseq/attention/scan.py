"""The scan: each query over the keys at least ``delay`` positions before it, in linear time, forward and backward.

Everything causal is this one operation: plain FAVOR+ is delay 0; beyond an exact window of w it is delay w; the right
half of a bidirectional window is the same on the reversed sequence. It returns (out, lse), lse the logarithm of the
denominator, so that parts over disjoint keys combine exactly (:func:`longseq.attention.parts.combine`).

For a chunk of queries with running state S (sums over earlier keys of [v, 1], log-scale c), the key chunk ``delay``
positions earlier with log-scales b, ṽ = [v, 1]:

    M_i   = max(c, max_{j ≤ i} b_j)                        a scale that depends on no later key
    A_ij  = (φ(q_i)ᵀφ(k_j)) · exp(b_j − M_i),  j ≤ i       keys of this chunk
    ñ_i   = Σ_j A_ij ṽ_j + e^{c−M_i} Sᵀφ(q_i)              numerator, and denominator in the last column
    out_i = ñ_i[:e] / ñ_i[e],   lse_i = log ñ_i[e] + M_i + log-scale of φ(q_i)

Backward, from the last chunk to the first, with the gradient of ñ

    g_i = [dout_i, dlse_i − dout_iᵀ out_i] / ñ_i[e]

and R = Σ over later queries of φ(q_i) g_iᵀ e^{c'−M_i}, c' the log-scale after this chunk's keys:

    dA_ij   = (g_iᵀṽ_j) · exp(b_j − M_i),  j ≤ i
    dφ(q_i) = Σ_j dA_ij φ(k_j) + e^{c−M_i} S g_i
    dφ(k_j) = Σ_i dA_ij φ(q_i) + e^{b_j−c'} R ṽ_j
    dṽ_j    = Σ_i A_ij g_i     + e^{b_j−c'} Rᵀφ(k_j)

Two more things act on the log-scales alone. A decay e^{−γ(i−j)} adds γ·j to b_j, j counted from the chunk's start so
that the numbers stay small, and takes γ·C from c between chunks. Its gradient is counted the same way, each chunk from
its own start: with B_j = φ(k_j)ᵀdφ(k_j) the gradient of the log-weight of key j, and Σ S ⊙ R that of all weights that
pass through a state,

    dγ = Σ_chunks [Σ_j (j − delay) B_j − Σ_i i·dlse_i] − C Σ_{states between chunks} Σ S ⊙ R

(positions counted from the sequence's start would cost a digit for each tenfold of its length). Forget gates act
likewise: :mod:`longseq.attention.gates`. A document boundary empties the state: queries of another document than the
state's last key do not read it, and it keeps only the last document's keys.

Features exist for one group of chunks at a time. The state before each group is kept for the backward pass, those
between its chunks are built again by addition: rebuilding them by subtraction would drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longseq.attention import gates
from longseq.attention.chunks import Group, add_products, flow, in_a_row, moment, products, put
from longseq.attention.feature_maps import FeatureMap
from longseq.attention.state import NOTHING, AttentionState, inverse, widened, with_ones

# Shorter chunks have less of the square that grows with them, longer ones fewer passes over the (m, e) state.
CHUNK = 64
# Chunks whose features exist at a time; one state is kept for each group. At m = 256 and e = 64 a state is 67 KB:
# 520 bytes a token and head. Longer groups keep less and were no quicker.
GROUP = 2


@dataclass(frozen=True)
class Scanned:
    """What a scan gives, and what its backward pass needs. Nothing is an alias of an input."""

    out: Tensor  # (N, L, e)
    lse: Tensor  # (N, L, 1)
    inverse_den: Tensor  # (N, L, 1)
    kept: Sequence[Tensor | None]  # states between the groups of chunks; a backend's own business
    log_scale: Tensor  # of the state behind the last key, as seen from there: (N, 1, 1)


@dataclass(frozen=True)
class Gradients:
    """What an operation's backward pass gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None  # (N, 1, 1) float64, a scan's ``later`` ending behind the last key; or the gate's
    initial: Tensor | None = None  # a scan's, with respect to the sums of the initial state, (N, m, e + 1)


def scan_forward(rows: Rows, initial: AttentionState | None, learns: bool) -> Scanned:
    """The scan itself, from a state of earlier keys on.

    Args:
        rows: the inputs.
        initial: keys ``delay`` + 1 and more positions before the first query, as seen from ``delay`` positions before
            it (with a gate, from the last of them); where there are ``runs``, they are of the first position's
            document, whose number is 0. None: no keys.
        learns: whether a backward pass will follow.
    """
    rows = rows.widened()
    q, v, feature_map = rows.q, rows.v, rows.feature_map
    value_dim = v.shape[-1]
    out, lse, inverse_den = v.new_empty(v.shape), v.new_empty(*v.shape[:2], 1), v.new_empty(*v.shape[:2], 1)
    state = initial or AttentionState.empty(len(v), feature_map.features, value_dim, like=v)
    sums, log_scale, kept = state.sums.clone(), state.log_scale, []
    if learns:
        kept = list(scan_kept(rows, initial is not None)[1:])
    for number, (start, stop) in enumerate(rows.groups()):
        if learns:
            kept[0][number], kept[1][number] = sums, log_scale
        group = rows.load(start, stop)
        fq, q_scale = feature_map.queries(group.q)
        scales = group.scales(log_scale)
        entering = group.values * scales.entering
        total = torch.empty_like(entering)  # (G, N, C, e + 1)
        for index in range(len(fq)):
            torch.bmm(fq[index], sums, out=total[index])
            sums.mul_(scales.left[index]).baddbmm_(group.fk[index].mT, entering[index])
        attention = products(fq, group.fk.mT).mul_(scales.weights)
        add_products(total.mul_(scales.carried), attention, group.values)
        den = total[..., value_dim:]
        inv = inverse(den, feature_map.positive)
        log_den = den.abs().log_().add_(scales.row_scale).add_(q_scale)
        if group.offsets is not None:
            log_den -= group.offsets
        put(out, start, stop, total[..., :value_dim] * inv)
        put(lse, start, stop, log_den.masked_fill_(inv == 0, NOTHING))
        put(inverse_den, start, stop, inv)
        log_scale = scales.after
    if rows.decay is not None:
        log_scale = log_scale + (-q.shape[1] % CHUNK) * rows.decay  # the last chunk was counted as a whole one
    return Scanned(out, lse, inverse_den, kept, log_scale)


def scan_kept(rows: Rows, initial: bool) -> tuple[Tensor, ...]:
    """The denominators and what else :func:`scan_forward` keeps, empty; also of tensors that have a shape only.

    Here the states before each group, (groups, N, m, e + 1), and their log-scales.
    """
    v, (number, length, value_dim) = widened(rows.v[:, :0, :0]), rows.v.shape
    whole, rest = length // CHUNK, (length % CHUNK + CHUNK - 1) // CHUNK
    groups = (whole + GROUP - 1) // GROUP + rest
    sizes = (number, length, 1), (groups, number, rows.feature_map.features, value_dim + 1), (groups, number, 1, 1)
    return tuple(v.new_empty(size) for size in sizes)


def scan_backward(
    rows: Rows,
    out: Tensor,
    inverse_den: Tensor,
    kept: Sequence[Tensor | None],
    dout: Tensor | None,
    dlse: Tensor | None,
    later: Tensor | None,
    wants_decay: bool,
) -> Gradients:
    """The gradients, and those of queries behind the last one.

    Args:
        rows, out, inverse_den, kept: of :func:`scan_forward`.
        dout, dlse: (N, L, e) and (N, L, 1), or None for zeros.
        later: R of the queries behind the last one, (N, m, e + 1), at the log-scale of ``Scanned``. None: zeros.
        wants_decay: whether the decay's gradient is wanted.
    """
    rows = rows.widened()
    (q, k, v), decay, delay, feature_map = rows.qkv, rows.decay, rows.delay, rows.feature_map
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    no_keys = slice(max(0, k.shape[1] - delay), None)  # those too late for any query
    dk[:, no_keys], dv[:, no_keys] = 0.0, 0.0
    d_decay = torch.zeros_like(decay, dtype=torch.float64) if decay is not None and wants_decay else None
    d_gate = None if rows.gate is None else torch.zeros_like(rows.gate)
    sums_kept, scales_kept = kept
    assert sums_kept is not None
    assert scales_kept is not None
    length, flows_on = q.shape[1], later is not None
    later = torch.zeros_like(sums_kept[0]) if later is None else later.clone()  # R
    states, laters = (later.new_empty(GROUP, *later.shape) for _ in range(2))  # before and behind each chunk
    for number, (start, stop) in reversed(list(enumerate(rows.groups()))):
        group = rows.load(start, stop)
        fk, values = group.fk, group.values
        fq, _ = feature_map.queries(group.q)
        size = len(fq)
        grad = with_ones(rows.cut(dout, start, stop))  # g (G, N, C, e + 1)
        grad[..., -1] = -(grad[..., :-1] * rows.cut(out, start, stop)).sum(-1)
        if dlse is not None:
            grad[..., -1:] += rows.cut(dlse, start, stop)
        grad *= rows.cut(inverse_den, start, stop)

        states[0], log_scale = sums_kept[number], scales_kept[number]
        scales = group.scales(log_scale)
        entering, reading = values * scales.entering, grad * scales.carried
        for index in range(1, size):
            torch.mul(states[index - 1], scales.left[index - 1], out=states[index])
            states[index].baddbmm_(fk[index - 1].mT, entering[index - 1])
        if (d_decay is not None or d_gate is not None) and flows_on and stop == length:
            behind = states[size - 1] * scales.left[size - 1] + fk[size - 1].mT @ entering[size - 1]
            if d_decay is not None:
                d_decay += ((length - 1) // CHUNK * CHUNK - (length - delay)) * flow(behind, later)
            if d_gate is not None and length > delay:  # the state behind is seen from its last key
                d_gate[:, length - delay, None] += flow(behind, later)
        laters[size - 1] = later
        for index in reversed(range(size)):
            sums = later if index == 0 else laters[index - 1]
            torch.mul(laters[index], scales.left[index], out=sums).baddbmm_(fq[index].mT, reading[index])

        attention = products(fq, fk.mT).mul_(scales.weights)
        d_values = add_products(products(fk, laters[:size]).mul_(scales.entering), attention.mT, grad)
        d_attention = products(grad, values.mT).mul_(scales.weights)
        dfq = add_products(products(reading, states[:size].mT), d_attention, fk)
        dfk = add_products(products(entering, laters[:size].mT), d_attention.mT, fq)

        if d_gate is not None:
            of_keys = in_a_row((dfk * fk).sum(-1, keepdim=True))[:, max(delay - start, 0) :]
            d_gate[:, 1 + max(start - delay, 0) : 1 + max(stop - delay, 0)] -= of_keys
            d_gate[:, 1 + start : 1 + stop] += 0.0 if dlse is None else dlse[:, start:stop]
        if d_decay is not None:
            d_decay += moment((dfk * fk).sum(-1, keepdim=True), -delay)
            if dlse is not None:
                d_decay -= moment(rows.cut(dlse, start, stop), 0)
            for index in range(size):
                if start or index:
                    d_decay -= CHUNK * flow(states[index], laters[index - 1] if index else later)
        put(dq, start, stop, feature_map.queries_vjp(group.q, fq, dfq))
        put(dk, start - delay, stop - delay, feature_map.keys_vjp(group.k, fk, dfk))
        put(dv, start - delay, stop - delay, d_values[..., :-1])
    return Gradients(dq, dk, dv, d_decay if d_gate is None else d_gate, later)


@dataclass(frozen=True)
class Rows:
    """What every operation reads, for N = batch · heads rows; a scan cuts it into groups of equal chunks on demand.

    Attributes:
        q, k: (N, L, d), of any floating dtype. Without anything that depends on positions there may be other queries
            than keys.
        v: (N, L, e), same dtype.
        decay: (N, 1, 1) γ ≥ 0; every weight is multiplied by e^{−γ(i−j)}. None: no decay.
        hidden: (N, L) bool, True where a key is padding and must not be seen, or None.
        runs: (N, L) integers ≥ 0 that never decrease; a query sees keys of its own number only. None: one document.
        phi: the feature map, in the dtype of sums: fp32 or float64. None: a window has none.
        delay: of a scan, how many positions the nearest visible key lies before the query.
        gate: (N, L + 1, 1) float64, in the place of a decay: see :mod:`longseq.attention.gates`. None: no gate.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    hidden: Tensor | None = None
    runs: Tensor | None = None
    phi: FeatureMap | None = None
    delay: int = 0
    gate: Tensor | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def fading(self) -> Tensor | None:
        """Decay or gate."""
        return self.decay if self.gate is None else self.gate

    def faded_by(self, fading: Tensor | None) -> Rows:
        """With a decay, (N, 1, 1), or a gate."""
        gated = fading is not None and fading.shape[1] > 1
        return replace(self, gate=fading) if gated else replace(self, decay=fading)

    @property
    def feature_map(self) -> FeatureMap:
        assert self.phi is not None
        return self.phi

    def reversed(self) -> Rows:
        """From the last position to the first."""
        q, k, v = (x.flip(1) for x in self.qkv)
        hidden = None if self.hidden is None else self.hidden.flip(1)
        runs = None if self.runs is None else self.runs[:, -1:] - self.runs.flip(1)
        gate = None if self.gate is None else gates.turned(self.gate)
        return replace(self, q=q, k=k, v=v, hidden=hidden, runs=runs, gate=gate)

    def at(self, where: slice) -> Rows:
        """Some of the positions."""
        q, k, v = (x[:, where] for x in self.qkv)
        hidden, runs = (None if x is None else x[:, where] for x in (self.hidden, self.runs))
        gate = None if self.gate is None else gates.part(self.gate, where)
        return replace(self, q=q, k=k, v=v, hidden=hidden, runs=runs, gate=gate)

    def fade(self, start: int, stop: int) -> Tensor | None:
        """What is added to the log of a weight on the way from before position ``start`` to before ``stop``."""
        if self.gate is not None:
            return (self.gate[:, stop, None] - self.gate[:, start, None]).to(widened(self.v[:, :0]).dtype)
        return None if self.decay is None else -self.decay * (stop - start)

    def widened(self) -> Rows:
        """The same with fp32 in the place of bf16 and fp16."""
        return replace(self, q=widened(self.q), k=widened(self.k), v=widened(self.v))

    def groups(self) -> list[tuple[int, int]]:
        """(start, stop) of each group: GROUP chunks, fewer at the end, and last what is left of less than a chunk."""
        length, step = self.q.shape[1], GROUP * CHUNK
        whole = length - length % CHUNK
        groups = [(start, min(start + step, whole)) for start in range(0, whole, step)]
        return groups + ([(whole, length)] if whole < length else [])

    def cut(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Positions start…stop of x (N, L, ·) as chunks: (G, N, C, ·). Zeros stand before the first position."""
        size = min(CHUNK, stop - start)
        part = x[:, max(start, 0) : max(stop, 0)]
        if start < 0:
            part = torch.cat((part.new_zeros(len(x), min(-start, stop - start), *part.shape[2:]), part), dim=1)
        made: Tensor = part.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
        return made

    def load(self, start: int, stop: int) -> Group:
        keys = start - self.delay, stop - self.delay
        q, k, v = self.cut(self.q, start, stop), self.cut(self.k, *keys), self.cut(self.v, *keys)
        positions = torch.arange(q.shape[2], device=q.device)[:, None]  # (C, 1)
        absent = None if self.hidden is None else self.cut(self.hidden[..., None], *keys)
        if keys[0] < 0:
            chunk_starts = torch.arange(*keys, q.shape[2], device=q.device)[:, None, None, None]
            before_first = chunk_starts + positions < 0
            absent = before_first if absent is None else absent | before_first
        if absent is not None:
            # Whatever stands in padding, NaN even, must not get past this line.
            k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        fk, scale = self.feature_map.keys(k)
        offsets = fading = None
        if self.decay is not None:
            scale = torch.addcmul(scale, self.decay, positions.to(scale))
            offsets = self.decay * (positions + self.delay)
            fading = -CHUNK * self.decay.expand(len(q), *self.decay.shape)
        if self.gate is not None:
            sums, ends = self.gate[:, 1:], gates.anchors(self.gate, keys[0], q.shape[2], len(q) + 1)
            scale = scale + (ends[:-1] - self.cut(sums, *keys)).to(scale)
            offsets = (ends[:-1] - self.cut(sums, start, stop)).to(scale)
            fading = ends.diff(dim=0).to(scale)
        if absent is not None:
            scale = scale.masked_fill(absent, -torch.inf)
        q_runs = k_runs = runs_before = None
        if self.runs is not None:
            runs = self.runs[..., None]
            q_runs, k_runs = self.cut(runs, start, stop), self.cut(runs, *keys)
            first = runs[:, keys[0] - 1 : keys[0]] if keys[0] > 0 else runs[:, :1]
            runs_before = torch.cat((first[None], k_runs[:-1, :, -1:]))
        seen = positions >= positions.T
        return Group(q, k, fk, scale, with_ones(v), q_runs, k_runs, runs_before, offsets, fading, seen)
