"""FAVOR+ by our own Triton kernels: the scan and the bidirectional attention, forward and backward.

The formulas are those of :mod:`longseq.attention.scan` and :mod:`longseq.attention.bidirectional`; their names are
used here too. The order differs, so that chunks run in parallel: the log-scales of the states are found first (they
need no features), then the sums of each chunk, then the running sums before each chunk, then all outputs at once.

Kept for the backward pass are a few numbers a row; the states are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from longseq.attention import bidirectional_operator, scan_operator
from longseq.attention import triton_kernels as kernels
from longseq.attention.bidirectional import Total
from longseq.attention.feature_maps import FeatureMap, Generalised, PositiveExponential
from longseq.attention.parts import Part
from longseq.attention.scan import Rows, ScanGradients, Scanned
from longseq.attention.state import NOTHING, AttentionState, widened
from longseq.attention.triton_frames import CHUNK, Frames, at_positions
from longseq.attention.triton_launch import on, padded, pointer

# Features that a program holds at a time, beside CHUNK rows.
FEATURES = 16
# Bidirectional sums over the keys are formed in parts of this length, in parallel, and then added.
SPAN = 2048
# States in memory at a time: 1 KB a token and head at m = 256, e = 64, so 512 K tokens · heads; or one head, if longer.
STATE_BYTES = 512 * 1024**2


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    delay: int = 0,
    hidden: Tensor | None = None,
    runs: Tensor | None = None,
    decay: Tensor | None = None,
) -> Part:
    """See :func:`longseq.attention.scan_operator.scan`."""
    return scan_operator.scan(
        q, k, v, feature_map, delay=delay, hidden=hidden, runs=runs, decay=decay, backend="triton"
    )


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, hidden: Tensor | None) -> Tensor:
    """See :func:`longseq.attention.bidirectional_operator.bidirectional_attention`."""
    return bidirectional_operator.bidirectional_attention(q, k, v, feature_map, hidden, backend="triton")


@dataclass(frozen=True)
class _Map:
    """A feature map as the kernels take it."""

    weight: Tensor  # (m, d)
    shift: Tensor  # (m,)
    log_constant: float
    exponential: bool

    @classmethod
    def of(cls, feature_map: FeatureMap) -> _Map:
        assert isinstance(feature_map, (PositiveExponential, Generalised))
        weight = feature_map.weight.contiguous()
        shift = feature_map.shift if isinstance(feature_map, PositiveExponential) else None
        shift = weight.new_zeros(len(weight)) if shift is None else shift.contiguous()
        return cls(weight, shift, feature_map.log_constant, isinstance(feature_map, PositiveExponential))


@dataclass(frozen=True)
class _Launch:
    """The kernels, with the arguments that are the same all through one operation."""

    map: _Map
    head_dim: int
    value_dim: int

    @property
    def features(self) -> int:
        return self.map.weight.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """m, d, e, and the 0 that keeps loads inside of loops."""
        return self.features, self.head_dim, self.value_dim, 0

    @property
    def tiles(self) -> dict[str, Any]:
        return {
            "EXPONENTIAL": self.map.exponential,
            "C": CHUNK,
            "F": FEATURES,
            "D": padded(self.head_dim),
            "num_warps": 4,
            "num_stages": 2,
        }

    @property
    def wide_tiles(self) -> dict[str, Any]:
        return {**self.tiles, "E": padded(self.value_dim)}

    def slices(self, chunks: Tensor, states: int = 1) -> Iterator[slice]:
        """Slices of N, given a tensor (N, chunks), of which that many states a chunk fit into memory together."""
        rows, number = chunks.shape
        step = max(1, STATE_BYTES // (states * number * self.features * (self.value_dim + 1) * 4))
        return (slice(first, first + step) for first in range(0, rows, step))

    def measure(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gauge and log-scale of each row of x, (N, L) both."""
        gauge, log_scale = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
        mask = gauge if hidden is None else hidden.contiguous().view(torch.uint8)
        kernels.measure[_chunks(x), len(x)](
            x, mask, self.map.weight, self.map.shift, gauge, log_scale, x.shape[1], self.features, self.head_dim,
            0, 0.5 * self.head_dim**-0.5, self.map.log_constant, HIDDEN=hidden is not None, **self.tiles,
        )  # fmt: skip
        return gauge, log_scale

    def sums(
        self, x: Tensor, values: Tensor, alpha: Tensor, beta: Tensor, gauge: Tensor, *, span: int, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Σ α_t φ(x_t) v_tᵀ (N, parts, m, e) and Σ β_t φ(x_t) (N, parts, m) of every ``span`` positions."""
        m, e, total = self.features, self.value_dim, alpha.shape[1]
        parts = triton.cdiv(total, span)
        sums, ones = x.new_empty(len(x), parts, m, e), x.new_empty(len(x), parts, m)
        kernels.add_up[parts, len(x), triton.cdiv(m, self.tiles["F"])](
            x, values, alpha, beta, gauge, self.map.weight, self.map.shift, sums, ones, x.shape[1], total, offset,
            span, m, self.head_dim, e, **self.wide_tiles,
        )  # fmt: skip
        return sums, ones

    def run_through(
        self, states: tuple[Tensor, Tensor], left: Tensor, initial: Tensor | None, *, reverse: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Turn sums of chunks into running sums before (``reverse``: after) each chunk, in place; and the last of all.

        initial: what they begin with, (N, m, e + 1); None: zeros.
        """
        begin = _split(initial) if initial is not None else tuple(torch.zeros_like(x[:, 0]) for x in states)
        end = torch.empty_like(begin[0]), torch.empty_like(begin[1])
        for parts, first, last in zip(states, begin, end, strict=True):
            width, block = parts[0, 0].numel(), 512
            kernels.run_through[triton.cdiv(width, block), len(parts)](
                parts, first, last, left, parts.shape[1], width, REVERSE=reverse, BLOCK=block
            )
        return states, end


def scan_forward(rows: Rows, initial: AttentionState | None, learns: bool) -> Scanned:
    """See :func:`longseq.attention.scan.scan_forward`."""
    q, k, v, runs = _contiguous(rows)
    number, length, head_dim = q.shape
    launch = _Launch(_Map.of(rows.feature_map), head_dim, v.shape[-1])
    delay = min(rows.delay, length)  # beyond, no key is visible all the same
    begin, scale = (None, None) if initial is None else (initial.sums, initial.log_scale)
    with on(q.device):
        (q_gauge, q_scale), (k_gauge, k_scale) = launch.measure(q), launch.measure(k, rows.hidden)
        frames = Frames.of(k_scale, length, delay, runs, rows.decay, scale)
        out, lse = torch.empty_like(v), v.new_empty(number, length, 1)
        inverse_den, row_scale = torch.empty_like(frames.key_scale), torch.empty_like(frames.key_scale)
        numbers = pointer(runs, q)
        for n in launch.slices(frames.before):
            part = frames[n]
            state, _ = _states(launch, k[n], v[n], k_gauge[n], part, delay, None if begin is None else begin[n])
            kernels.attend[_chunks(q), len(part.before)](
                q[n], k[n], v[n], q_gauge[n], q_scale[n], k_gauge[n], part.key_scale, numbers[n], part.before,
                pointer(part.run_before, q), launch.map.weight, launch.map.shift, *state, out[n], lse[n],
                inverse_den[n], row_scale[n], length, delay, *launch.sizes,
                LOCAL=True, RUNS=runs is not None, **launch.wide_tiles,
            )  # fmt: skip
    log_scale = frames.after[:, -1:, None]
    if rows.decay is not None:
        offsets = torch.arange(length, device=q.device) % CHUNK + delay
        lse = torch.where(lse == NOTHING, lse, lse - rows.decay * offsets.to(lse)[:, None])
        log_scale = log_scale - rows.decay * ((length - 1) % CHUNK + 1)
    kept = (
        q_gauge, k_gauge, row_scale, None if begin is None else begin.clone(),
        frames.key_scale, frames.before, frames.after, frames.same, frames.last, frames.run_before,
    )  # fmt: skip
    return Scanned(out, lse, inverse_den, kept, log_scale)


def scan_backward(
    rows: Rows,
    out: Tensor,
    inverse_den: Tensor,
    kept: Sequence[Tensor | None],
    dout: Tensor | None,
    dlse: Tensor | None,
    later: Tensor | None,
    wants_decay: bool,
) -> ScanGradients:
    """See :func:`longseq.attention.scan.scan_backward`."""
    q, k, v, runs = _contiguous(rows)
    q_gauge, k_gauge, row_scale, begin, *scales = kept
    assert q_gauge is not None
    assert k_gauge is not None
    assert row_scale is not None
    frames, length = Frames(*scales), q.shape[1]  # type: ignore[arg-type]
    launch, delay = _Launch(_Map.of(rows.feature_map), q.shape[-1], v.shape[-1]), min(rows.delay, length)
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    shared = -(dout * out).sum(-1) if dlse is None else dlse[..., 0] - (dout * out).sum(-1)
    u = inverse_den * at_positions(shared, length, 0, fill=0.0)
    carried, entering = frames.carried(row_scale, runs), frames.entering()
    alpha, beta = carried * inverse_den, carried * u
    # Keys that no query is far enough from are in no chunk.
    new = torch.zeros_like if delay else torch.empty_like
    dq, dk, dv, d_scale = torch.empty_like(q), new(k), new(v), torch.empty_like(u)
    d_initial = v.new_empty(len(v), launch.features, launch.value_dim + 1)
    d_decay = torch.zeros(len(v), dtype=torch.float64, device=v.device)
    numbers = pointer(runs, q)
    with on(q.device):
        for n in launch.slices(frames.before, states=1 + wants_decay):
            part, enter = frames[n], entering[n]
            inputs = (q[n], k[n], v[n], dout[n], q_gauge[n], k_gauge[n], part.key_scale, numbers[n], row_scale[n])
            tiles = {"LOCAL": True, "RUNS": runs is not None, **launch.wide_tiles}
            state = launch.sums(q[n], dout[n], alpha[n], beta[n], q_gauge[n], span=CHUNK)
            behind = None if later is None else later[n]
            state, first = launch.run_through(state, part.left(), behind, reverse=True)  # R
            d_initial[n][..., :-1], d_initial[n][..., -1] = first
            kernels.values_vjp[_chunks(q), len(enter)](
                *inputs, inverse_den[n], enter, launch.map.weight, launch.map.shift, state[0],
                dv[n], length, delay, *launch.sizes, **tiles,
            )  # fmt: skip
            kernels.features_vjp[_chunks(q), len(enter)](
                *inputs, inverse_den[n], u[n], enter, enter, launch.map.weight, launch.map.shift, *state,
                dk[n], d_scale[n], length, delay, *launch.sizes, launch.head_dim**-0.5, KEYS=True, **tiles,
            )  # fmt: skip
            later_states = state if wants_decay else ()
            del state  # two are twice the memory
            state, end = _states(launch, k[n], v[n], k_gauge[n], part, delay, None if begin is None else begin[n])
            kernels.features_vjp[_chunks(q), len(enter)](
                *inputs, inverse_den[n], u[n], alpha[n], beta[n], launch.map.weight, launch.map.shift, *state,
                dq[n], d_scale[n], length, delay, *launch.sizes, launch.head_dim**-0.5, KEYS=False, **tiles,
            )  # fmt: skip
            for sums, wanted in zip(state, later_states, strict=False):
                d_decay[n] -= CHUNK * _flow(sums[:, 1:], wanted[:, :-1])
            if wants_decay and behind is not None:
                way = length - delay - (length - 1) // CHUNK * CHUNK
                for sums, wanted in zip(end, _split(behind), strict=True):
                    d_decay[n] -= way * _flow(sums, wanted)
            del state, later_states
    if wants_decay:  # counted from every chunk's start, as in the PyTorch version
        places = torch.arange(d_scale.shape[1], device=q.device, dtype=torch.float64) % CHUNK
        d_decay += d_scale.double() @ (places - delay)
        if dlse is not None:
            d_decay -= dlse[..., 0].double() @ places[:length]
    return ScanGradients(dq, dk, dv, d_decay[:, None, None] if wants_decay else None, d_initial)


def sum_up(
    x: Tensor, values: Tensor, last: Tensor | None, log_weight: Tensor | None, feature_map: FeatureMap
) -> AttentionState:
    """See :func:`longseq.attention.bidirectional.sum_up`."""
    x, values = widened(x).contiguous(), widened(values).contiguous()
    launch = _Launch(_Map.of(feature_map), x.shape[-1], values.shape[-1])
    with on(x.device):
        out = None if log_weight is None else log_weight[..., 0] == -torch.inf
        gauge, scale = launch.measure(x, out)
        if log_weight is not None:
            scale = scale + log_weight[..., 0]
        scale = at_positions(scale, x.shape[1], 0, fill=-torch.inf)
        top = scale.amax(1, keepdim=True).clamp_(min=NOTHING)
        weights = torch.exp(scale - top)
        ends = weights if last is None else weights * at_positions(last[..., 0], x.shape[1], 0, fill=0.0)
        if last is not None:
            ends = ends.masked_fill(weights == 0, 0.0)
        return _joined(*_total(launch.sums(x, values, weights, ends, gauge, span=SPAN)), top[..., None])


def bidirectional_forward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, feature_map: FeatureMap, total: Total | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`longseq.attention.bidirectional.bidirectional_forward`."""
    q, k, v = (widened(x).contiguous() for x in (q, k, v))
    launch = _Launch(_Map.of(feature_map), q.shape[-1], v.shape[-1])
    with on(q.device):
        (q_gauge, _), (k_gauge, k_scale) = launch.measure(q), launch.measure(k, hidden)
        key_scale = at_positions(k_scale, k.shape[1], 0, fill=-torch.inf)
        top = key_scale.amax(1, keepdim=True).clamp_(min=NOTHING)
        entering = torch.exp(key_scale - top)
        sums, ones = _total(launch.sums(k, v, entering, entering, k_gauge, span=SPAN))
        if total is not None:
            state = total(_joined(sums, ones, top[..., None]))()
            (sums, ones), entering = _split(state.sums), torch.exp(key_scale - state.log_scale[..., 0])
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        inverse_den = q.new_empty(len(q), _chunks(q) * CHUNK)
        kernels.attend[_chunks(q), len(q)](
            q, q, q, q_gauge, q, q, q, q, q, q, launch.map.weight, launch.map.shift, sums, ones,
            out, q, inverse_den, q, q.shape[1], 0, *launch.sizes,
            LOCAL=False, RUNS=False, **launch.wide_tiles,
        )  # fmt: skip
    return out, (q_gauge, k_gauge, key_scale, entering, inverse_den, sums, ones)


def bidirectional_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    feature_map: FeatureMap,
    total: Total | None,
    out: Tensor,
    kept: Sequence[Tensor | None],
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`longseq.attention.bidirectional.bidirectional_backward`."""
    q_gauge, k_gauge, key_scale, entering, inverse_den, *state = kept
    assert q_gauge is not None
    assert inverse_den is not None
    assert entering is not None
    q, k, v = (widened(x).contiguous() for x in (q, k, v))
    launch, dout = _Launch(_Map.of(feature_map), q.shape[-1], v.shape[-1]), dout.contiguous()
    u = inverse_den * at_positions(-(dout * out).sum(-1), q.shape[1], 0, fill=0.0)
    dq, dk, dv, d_scale = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(entering)
    tiles = {"LOCAL": False, "RUNS": False, **launch.wide_tiles}
    rows = (q, k, v, dout, q_gauge, k_gauge, key_scale, q, q, q)
    weights, norm = (launch.map.weight, launch.map.shift), launch.head_dim**-0.5
    with on(q.device):
        d_state = _total(launch.sums(q, dout, inverse_den, u, q_gauge, span=SPAN))  # R
        if total is not None:  # all have the same log-scale
            d_state = _split(total(_joined(*d_state, u.new_zeros(len(u), 1, 1)))().sums)
        kernels.values_vjp[_chunks(k), len(k)](
            *rows, entering, *weights, d_state[0], dv, k.shape[1], 0, *launch.sizes, **tiles
        )
        kernels.features_vjp[_chunks(k), len(k)](
            *rows, q, entering, entering, *weights, *d_state, dk, d_scale, k.shape[1], 0, *launch.sizes, norm,
            KEYS=True, **tiles,
        )  # fmt: skip
        kernels.features_vjp[_chunks(q), len(q)](
            *rows, q, inverse_den, u, *weights, *state, dq, d_scale, q.shape[1], 0, *launch.sizes, norm,
            KEYS=False, **tiles,
        )  # fmt: skip
    return dq, dk, dv


def scan_kept(rows: Rows, initial: bool) -> tuple[Tensor | None, ...]:
    """See :func:`longseq.attention.scan.scan_kept`."""
    (number, length, value_dim), like = rows.v.shape, widened(rows.v[:, :0, :0])
    total = -(-length // CHUNK) * CHUNK
    chunks, wide = total // CHUNK, like.new_empty(number, length)
    begin = like.new_empty(number, rows.feature_map.features, value_dim + 1) if initial else None
    key_scale, before = like.new_empty(number, total), like.new_empty(number, chunks)
    scales: tuple[Tensor | None, ...] = key_scale, before, torch.empty_like(before), None, None, None
    if rows.runs is not None:
        last = like.new_empty(number, chunks, CHUNK, dtype=torch.bool)
        same, run_before = last.new_empty(number, chunks), like.new_empty(number, chunks, dtype=torch.int32)
        scales = *scales[:3], same, last, run_before
    return torch.empty_like(key_scale), wide, torch.empty_like(wide), torch.empty_like(key_scale), begin, *scales


def bidirectional_kept(q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap) -> tuple[Tensor, ...]:
    """See :func:`longseq.attention.bidirectional.bidirectional_kept`."""
    like, m = widened(v[:, :0, :0]), feature_map.features
    queries, keys = (-(-x.shape[1] // CHUNK) * CHUNK for x in (q, k))
    sizes = (q.shape[1],), (k.shape[1],), (keys,), (keys,), (queries,), (m, v.shape[2]), (m,)
    return tuple(like.new_empty(len(v), *size) for size in sizes)


def _joined(sums: Tensor, ones: Tensor, log_scale: Tensor) -> AttentionState:
    return AttentionState(torch.cat((sums, ones[..., None]), dim=-1), log_scale)


def _split(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (N, m, e) and Σ φ (N, m) of those of a state."""
    return sums[..., :-1].contiguous(), sums[..., -1].contiguous()


def _contiguous(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and runs as the kernels take them."""
    runs = None if rows.runs is None else rows.runs.to(torch.int32).contiguous()
    rows = rows.widened()
    return rows.q.contiguous(), rows.k.contiguous(), rows.v.contiguous(), runs


def _states(
    launch: _Launch, k: Tensor, v: Tensor, gauge: Tensor, frames: Frames, delay: int, initial: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The state before each chunk, (N, chunks, m, e) and (N, chunks, m), and the one behind the last."""
    entering = frames.entering()
    sums = launch.sums(k, v, entering, entering, gauge, span=CHUNK, offset=delay)
    return launch.run_through(sums, frames.left(), initial, reverse=False)


def _flow(sums: Tensor, later: Tensor) -> Tensor:
    """Σ sums · later of each row of N, in float64."""
    return (sums * later).flatten(1).sum(1, dtype=torch.float64)


def _total(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    sums, ones = parts
    return sums.sum(1), ones.sum(1)


def _chunks(x: Tensor) -> int:
    return triton.cdiv(x.shape[1], CHUNK)
