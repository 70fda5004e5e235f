"""FAVOR+ by our own Triton kernels: the scan and the bidirectional attention, forward and backward.

The formulas are those of :mod:`longseq.attention.scan` and :mod:`longseq.attention.bidirectional`; their names are
used here too. The order differs, so that segments of the sequence run in parallel: first the sums of each segment,
then the state before each, then every segment goes through its chunks from that state on.

Kept for the backward pass are a few numbers a row; the states are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from longseq.attention.backends.triton import gradients as gradients
from longseq.attention.backends.triton import kernels as kernels
from longseq.attention.backends.triton import later as later_sums
from longseq.attention.backends.triton.launch import chip, on, padded, pointer
from longseq.attention.backends.triton.tiles import CHUNK, tiles
from longseq.attention.bidirectional import Total
from longseq.attention.chunks import flow
from longseq.attention.feature_maps import FeatureMap, Generalised, PositiveExponential, as_operands
from longseq.attention.scan import Gradients, Rows, Scanned
from longseq.attention.state import AttentionState

# Programs of a kernel: eight for each multiprocessor of an H200, where the sequences are long enough.
PROGRAMS = 1056
# Segments of a sequence: a state goes from each to the next, one after the other.
SEGMENTS = 512
# States in memory at a time. At m = 256, e = 64 and PROGRAMS segments they take 70 MB.
STATE_BYTES = 512 * 1024**2


def segments(rows: int, length: int) -> tuple[int, int]:
    """How many segments each of that many sequences is cut into, and of how many chunks."""
    chunks = triton.cdiv(length, CHUNK)
    steps = triton.cdiv(chunks, min(triton.cdiv(PROGRAMS, rows), SEGMENTS))
    return triton.cdiv(chunks, steps), steps


@dataclass(frozen=True)
class _Keys:
    """What :func:`add_up` adds up: rows x (N, L, d) and values, and what is said of them."""

    x: Tensor
    values: Tensor
    hidden: Tensor | None = None
    log_weight: Tensor | None = None  # (N, L)
    last: Tensor | None = None  # (N, L) in the place of the values' last component, 1
    runs: Tensor | None = None  # (N, L) int32
    decay: Tensor | None = None  # (N,)
    gate: Tensor | None = None  # (N, L + 1) float64
    delay: int = 0

    def fading(self, unused: Tensor) -> Tensor:
        """Decay or gate as kernels take them, by one pointer."""
        return pointer(self.decay if self.gate is None else self.gate, unused)

    @property
    def kinds(self) -> dict[str, bool]:
        """What the kernels are told of documents, decay and gate."""
        return {"RUNS": self.runs is not None, "DECAY": self.decay is not None, "GATE": self.gate is not None}

    def __getitem__(self, n: slice) -> _Keys:
        parts: dict[str, Any] = {name: x[n] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **parts)


class _Launch:
    """The kernels, with the arguments that are the same all through one operation on ``rows`` sequences."""

    def __init__(self, feature_map: FeatureMap, q: Tensor, length: int, value_dim: int):
        assert isinstance(feature_map, (PositiveExponential, Generalised))
        exponential, half = isinstance(feature_map, PositiveExponential), q.dtype != torch.float32
        self.whole = exponential and half  # log-scales, see chunk.through
        weight = as_operands(feature_map.weight, q.dtype)
        shift = feature_map.shift if isinstance(feature_map, PositiveExponential) else None
        self.map = weight, pointer(None if shift is None else shift.float().contiguous(), weight)
        self.features, self.head_dim, self.value_dim = len(weight), q.shape[-1], value_dim
        self.log_constant, self.half_norm = feature_map.log_constant, 0.5 * self.head_dim**-0.5
        self.length, self.chunks = length, triton.cdiv(length, CHUNK)
        self.segments, self.steps = segments(len(q), length)
        self.sizes = {"m": self.features, "d": self.head_dim, "e": value_dim}
        self.kinds: dict[str, Any] = {
            **self.sizes, "EXPONENTIAL": exponential, "SHIFTED": shift is not None, "HALF": half,
            "C": CHUNK, "D": padded(self.head_dim), "E": padded(value_dim),
        }  # fmt: skip
        self.tiles = tiles(chip(q.device), self.features, self.head_dim, value_dim, half=half)
        self.blocks = triton.cdiv(self.features, self.tiles.sums["F"])  # programs that share a segment's sums
        self.state_blocks = triton.cdiv(
            self.features * (value_dim + 1), self.tiles.states["B"]
        )  # and those that share its state

    def slices(self, rows: int, states: int) -> Iterator[slice]:
        """Slices of N, of which that many states a segment fit into memory together."""
        step = max(1, STATE_BYTES // (states * self.segments * self.features * (self.value_dim + 1) * 4))
        return (slice(first, first + step) for first in range(0, rows, step))

    def shape(self, states: bool) -> tuple[int, int]:
        """Of a state, or of sums."""
        return (self.features, self.value_dim + 1) if states else (self.value_dim + 1, self.features)

    def empty_sums(self, like: Tensor, rows: int) -> Tensor:
        """Σ [v, 1] φ(x)ᵀ of every segment, or the state before or behind it."""
        return _floats(like, rows, self.segments, *self.shape(states=False))

    def add_up(self, of: _Keys, gauge: Tensor, log_scale: Tensor, *, gauged: bool = False) -> tuple[Tensor, Tensor]:
        """The sums of each segment, and their log-scales (N, segments)."""
        sums, scales = self.empty_sums(of.x, len(of.x)), _floats(of.x, len(of.x), self.segments)
        kernels.add_up[self.segments, len(of.x), self.blocks](
            of.x, of.values, pointer(of.hidden, of.x), pointer(of.log_weight, gauge), pointer(of.last, gauge),
            pointer(of.runs, of.x), of.fading(gauge), *self.map, gauge, log_scale, sums,
            scales, self.length, of.delay, self.steps, self.half_norm, self.log_constant,
            GAUGED=gauged, HIDDEN=of.hidden is not None, WEIGHTED=of.log_weight is not None,
            LAST=of.last is not None, **of.kinds, **self.kinds, **self.tiles.sums,
        )  # fmt: skip
        return sums, scales

    def run_through(
        self, sums: Tensor, scales: Tensor, of: _Keys, initial: AttentionState | None = None, *, states: bool = True
    ) -> tuple[Tensor, AttentionState]:
        """Turn sums into the states before each segment. c before each and behind the last; the state behind all.

        states: the last is a state (N, m, e + 1), else it lies as the sums do, (N, e + 1, m).
        """
        rows = len(scales)
        begins = _floats(scales, rows, self.segments + 1)
        final = _floats(scales, rows, *self.shape(states)), _floats(scales, rows, 1, 1)
        first = (scales, scales) if initial is None else (initial.sums, initial.log_scale)
        kernels.run_through[self.state_blocks, rows](
            sums, scales, begins, *first, *final, pointer(of.runs, scales),
            of.fading(scales), self.length, of.delay, self.steps, self.segments, self.chunks,
            self.features, self.value_dim, INITIAL=initial is not None, STATES=states, **of.kinds, C=CHUNK,
            **self.tiles.states,
        )  # fmt: skip
        return begins, AttentionState(*final)

    def total(self, of: _Keys, gauge: Tensor, log_scale: Tensor, *, states: bool = True) -> AttentionState:
        """The state of all keys, laid out as by :meth:`run_through`."""
        sums, scales = self.add_up(of, gauge, log_scale)
        return self.run_through(sums, scales, of, states=states)[1]


def scan_forward(rows: Rows, initial: AttentionState | None, learns: bool, *, handed_on: bool = True) -> Scanned:
    """See :func:`longseq.attention.scan.scan_forward`.

    handed_on: what is kept is the result of an operator, of which every number is defined.
    """
    q, keys = rows.q.contiguous(), _keys(rows)
    number, length, _ = q.shape
    value_dim = keys.values.shape[-1]
    launch = _Launch(rows.feature_map, q, length, value_dim)
    if initial is not None:
        initial = AttentionState(initial.sums.contiguous(), initial.log_scale.contiguous())
    out, lse, inverse_den = (_floats(q, number, length, size) for size in (value_dim, 1, 1))
    q_gauge, k_gauge, key_scale, row_scale = (_floats(q, number, length) for _ in range(4))
    if keys.delay and handed_on:  # those of keys that no query is far enough from are not found
        k_gauge.zero_()
        key_scale.zero_()
    before = _floats(q, number, launch.chunks)
    log_scales: list[Tensor] = []
    with on(q.device):
        for n in launch.slices(number, states=1):
            part = keys[n]
            sums, scales = launch.add_up(part, k_gauge[n], key_scale[n])
            begins, final = launch.run_through(sums, scales, part, _cut(initial, n))
            log_scales.append(final.log_scale)
            kernels.attend[launch.segments, len(scales)](
                q[n], part.x, part.values, k_gauge[n], key_scale[n], pointer(part.runs, q), part.fading(q),
                *launch.map, sums, begins, q_gauge[n], row_scale[n], before[n],
                inverse_den[n], lse[n], out[n], length, part.delay, launch.steps, launch.half_norm,
                launch.log_constant, LOCAL=True, **part.kinds, **launch.kinds, **launch.tiles.outputs,
            )  # fmt: skip
            del sums, final  # or those of two slices would be in memory
    log_scale = log_scales[0] if len(log_scales) == 1 else torch.cat(log_scales)
    begin = (None, None) if initial is None else (initial.sums.clone(), initial.log_scale.clone())
    return Scanned(out, lse, inverse_den, (q_gauge, k_gauge, key_scale, row_scale, before, *begin), log_scale)


def scan_kept(rows: Rows, initial: bool) -> tuple[Tensor | None, ...]:
    """See :func:`longseq.attention.scan.scan_kept`."""
    number, length, value_dim = rows.v.shape
    wide = [_floats(rows.v, number, length) for _ in range(4)]
    begin: tuple[Tensor | None, Tensor | None] = None, None
    if initial:
        begin = _floats(rows.v, number, rows.feature_map.features, value_dim + 1), _floats(rows.v, number, 1, 1)
    return _floats(rows.v, number, length, 1), *wide, _floats(rows.v, number, -(-length // CHUNK)), *begin


def scan_backward(
    rows: Rows,
    out: Tensor,
    inverse_den: Tensor,
    kept: Sequence[Tensor | None],
    dout: Tensor | None,
    dlse: Tensor | None,
    later: Tensor | None,
    wants_decay: bool,
    *,
    parts: bool = False,
) -> Gradients:
    """See :func:`longseq.attention.scan.scan_backward`. parts: of the decay's, (N, ·), and not their sums.

    The gradient of a gate's sums at a position is what queries there lose, less what keys there give: each the sum of
    a pair's terms as the other side has it, so that rounding errors of a pair end between its two.
    """
    q, keys = rows.q.contiguous(), _keys(rows)
    q_gauge, k_gauge, key_scale, row_scale, before, begin, begin_scale = kept
    assert q_gauge is not None
    assert k_gauge is not None
    assert key_scale is not None
    assert row_scale is not None
    assert before is not None
    initial = None if begin is None or begin_scale is None else AttentionState(begin, begin_scale)
    number, length, head_dim = q.shape
    launch = _Launch(rows.feature_map, q, length, keys.values.shape[-1])
    dout = torch.zeros_like(out) if dout is None else dout.float().contiguous()
    dlse = None if dlse is None else dlse.float().contiguous()
    later = None if later is None else later.contiguous()
    dq, dk, dv, u = (torch.empty_like(x) for x in (q, keys.x, keys.values, row_scale))
    d_initial = _floats(q, number, launch.features, launch.value_dim + 1)
    programs = launch.state_blocks
    flows = torch.empty(number, programs + 2 * launch.segments, dtype=torch.float64, device=q.device)
    wants_decay = wants_decay and rows.fading is not None
    q_sums, k_sums = flows, flows
    d_gate = None if rows.gate is None or not wants_decay else torch.zeros_like(rows.gate)
    if d_gate is not None:
        q_sums, k_sums = _floats(q, number, length), torch.zeros_like(row_scale)
    kinds = {"LOCAL": True, "DLSE": dlse is not None, **launch.kinds}
    with on(q.device):
        for n in launch.slices(number, states=2):
            part = keys[n]
            numbers, rates = pointer(part.runs, q), part.fading(q)
            d_lse = pointer(None if dlse is None else dlse[n], u)
            sums, scales = launch.add_up(part, k_gauge[n], key_scale[n], gauged=True)
            begins, final = launch.run_through(sums, scales, part, _cut(initial, n))
            d_sums = launch.empty_sums(q, len(scales))  # R
            later_sums.add_up_queries[launch.segments, len(scales), launch.blocks](
                q[n], dout[n], out[n], d_lse, inverse_den[n], q_gauge[n], row_scale[n], begins, numbers, rates,
                *launch.map, u[n], d_sums, length, part.delay, launch.steps, **part.kinds, **kinds,
                **launch.tiles.sums,
            )  # fmt: skip
            later_sums.run_back[programs, len(scales)](
                d_sums, begins, u if later is None else later[n], d_initial[n], sums, final.sums, flows[n],
                key_scale[n], before[n], numbers, rates, length, part.delay, launch.steps, launch.segments,
                launch.chunks, launch.features, launch.value_dim, LATER=later is not None,
                FLOW=wants_decay and d_gate is None, STATES=True, WHOLE=launch.whole, **part.kinds, C=CHUNK,
                **launch.tiles.states,
            )  # fmt: skip
            if d_gate is not None and later is not None and length > part.delay:  # the state is seen from its last key
                d_gate[n, length - part.delay, 0] += flow(final.sums, later[n]).flatten()
            shared = (
                q[n], part.x, part.values, dout[n], out[n], d_lse, q_gauge[n], k_gauge[n], key_scale[n], row_scale[n],
                inverse_den[n], u[n],
            )  # fmt: skip
            gradients.queries_vjp[launch.segments, len(scales)](
                *shared, numbers, rates, before[n], *launch.map, sums, dq[n], q_sums[n], length, part.delay,
                launch.steps, programs, head_dim**-0.5, FLOW=wants_decay, **part.kinds, **kinds,
                **launch.tiles.queries,
            )  # fmt: skip
            gradients.keys_vjp[launch.segments, len(scales)](
                *shared, begins, numbers, before[n], *launch.map, d_sums, dk[n], dv[n], k_sums[n], length,
                part.delay, launch.steps, programs, head_dim**-0.5, FLOW=wants_decay, RUNS=part.runs is not None,
                GATE=d_gate is not None, **kinds, **launch.tiles.keys,
            )  # fmt: skip
            del sums, d_sums, final
    if d_gate is not None:
        d_gate[:, 1:, 0] += q_sums.double() - k_sums
        return Gradients(dq, dk, dv, d_gate, d_initial)
    d_decay = None if not wants_decay else flows if parts else flows.sum(1)[:, None, None]
    return Gradients(dq, dk, dv, d_decay, d_initial)


def sum_up(
    x: Tensor, values: Tensor, last: Tensor | None, log_weight: Tensor | None, feature_map: FeatureMap
) -> AttentionState:
    """See :func:`longseq.attention.bidirectional.sum_up`."""
    x, values = x.contiguous(), values.contiguous()
    number, length, _ = x.shape
    if not length:
        return AttentionState.empty(number, feature_map.features, values.shape[-1], like=_floats(x, 0))
    weight, ends = (None if t is None else t.expand(number, length, 1).float().contiguous() for t in (log_weight, last))
    with on(x.device):
        of = _Keys(x, values, log_weight=weight, last=ends)
        launch = _Launch(feature_map, x, length, values.shape[-1])
        return launch.total(of, *(_floats(x, number, length) for _ in range(2)))


def bidirectional_forward(rows: Rows, total: Total | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`longseq.attention.bidirectional.bidirectional_forward`."""
    (q, k, v), feature_map = (x.contiguous() for x in rows.qkv), rows.feature_map
    value_dim = v.shape[-1]
    k_gauge, key_scale = (_floats(q, *k.shape[:2]) for _ in range(2))
    q_gauge, inverse_den = (_floats(q, *q.shape[:2]) for _ in range(2))
    out = _floats(q, *q.shape[:2], value_dim)
    with on(q.device):
        of = _Keys(k, v, _bytes(rows.hidden))
        states = total is not None
        state = _Launch(feature_map, k, k.shape[1], value_dim).total(of, k_gauge, key_scale, states=states)
        if total is not None:
            state = total(state)()
        sums = state.sums.mT.contiguous() if states else state.sums
        log_scale = state.log_scale.contiguous()
        launch = _Launch(feature_map, q, q.shape[1], value_dim)
        kernels.attend[launch.chunks, len(q)](
            q, q, q, q_gauge, q_gauge, q, q, *launch.map, sums, q_gauge, q_gauge, q_gauge, q_gauge,
            inverse_den, q_gauge, out, q.shape[1], 0, 1, launch.half_norm, launch.log_constant,
            LOCAL=False, **of.kinds, **launch.kinds, **launch.tiles.outputs,
        )  # fmt: skip
    return out, (q_gauge, k_gauge, key_scale, log_scale, inverse_den, sums)


def bidirectional_kept(rows: Rows) -> tuple[Tensor, ...]:
    """See :func:`longseq.attention.bidirectional.bidirectional_kept`."""
    queries, keys, (number, _, value_dim) = rows.q.shape[1], rows.k.shape[1], rows.v.shape
    sizes = (queries,), (keys,), (keys,), (1, 1), (queries,), (value_dim + 1, rows.feature_map.features)
    return tuple(_floats(rows.v, number, *size) for size in sizes)


def bidirectional_backward(
    rows: Rows, total: Total | None, out: Tensor, kept: Sequence[Tensor | None], dout: Tensor
) -> Gradients:
    """See :func:`longseq.attention.bidirectional.bidirectional_backward`."""
    q_gauge, k_gauge, key_scale, log_scale, inverse_den, sums = kept
    assert q_gauge is not None
    q, k, v = (x.contiguous() for x in rows.qkv)
    dout = dout.float().contiguous()
    dq, dk, dv, u = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(q_gauge)
    launch = _Launch(rows.feature_map, q, q.shape[1], v.shape[-1])
    none = {"RUNS": False, "DECAY": False, "GATE": False}
    kinds = {"LOCAL": False, "DLSE": False, **launch.kinds}
    states = total is not None
    d_total = _floats(q, len(q), *launch.shape(states))
    with on(q.device):
        d_sums = launch.empty_sums(q, len(q))
        later_sums.add_up_queries[launch.segments, len(q), launch.blocks](
            q, dout, out, u, inverse_den, q_gauge, u, u, u, u, *launch.map, u, d_sums,
            q.shape[1], 0, launch.steps, **none, **kinds, **launch.tiles.sums,
        )  # fmt: skip
        same = u.new_zeros(len(q), launch.segments + 1)  # all have the same log-scale
        later_sums.run_back[launch.state_blocks, len(q)](
            d_sums, same, u, d_total, u, u, u, u, u, u, u, q.shape[1], 0, launch.steps,
            launch.segments, launch.chunks, launch.features, launch.value_dim, LATER=False, FLOW=False,
            STATES=states, WHOLE=False, **none, C=CHUNK, **launch.tiles.states,
        )  # fmt: skip
        if total is not None:
            d_total = total(AttentionState(d_total, u.new_zeros(len(u), 1, 1)))().sums
        d_state = d_total.mT.contiguous() if states else d_total
        shared = (q, k, v, dout, out, u, q_gauge, k_gauge, key_scale, u, inverse_den, u)
        gradients.queries_vjp[launch.chunks, len(q)](
            *shared, u, u, u, *launch.map, sums, dq, u, q.shape[1], 0, 1, 0, launch.head_dim**-0.5, FLOW=False,
            **none, **kinds, **launch.tiles.queries,
        )  # fmt: skip
        gradients.keys_vjp[triton.cdiv(k.shape[1], CHUNK), len(k)](
            *shared, log_scale, u, u, *launch.map, d_state, dk, dv, u, k.shape[1], 0, 1, 0, launch.head_dim**-0.5,
            FLOW=False, RUNS=False, GATE=False, **kinds, **launch.tiles.keys,
        )  # fmt: skip
    return Gradients(dq, dk, dv)


def _floats(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(*sizes, dtype=torch.float32)


def _bytes(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else hidden.contiguous().view(torch.uint8)


def _keys(rows: Rows) -> _Keys:
    """The keys and values of a scan as the kernels take them."""
    runs = None if rows.runs is None else rows.runs.to(torch.int32).contiguous()
    decay = None if rows.decay is None else rows.decay.flatten().float().contiguous()
    gate = None if rows.gate is None else rows.gate.detach().flatten(1).contiguous()
    delay = min(rows.delay, rows.q.shape[1])  # beyond, no key is visible all the same
    of = {"runs": runs, "decay": decay, "gate": gate}
    return _Keys(rows.k.contiguous(), rows.v.contiguous(), _bytes(rows.hidden), **of, delay=delay)


def _cut(state: AttentionState | None, n: slice) -> AttentionState | None:
    return None if state is None else AttentionState(state.sums[n], state.log_scale[n])
