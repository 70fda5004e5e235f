"""Triton kernels of FAVOR+'s backward pass, R of the segments: for names see :mod:`.chunk`.

:func:`add_up_queries` forms R's share of each segment, :func:`run_back` turns them into R behind each.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from longseq.attention.backends.triton.chunk import (
    ANY_LENGTH,
    INFINITY,
    NOTHING,
    exponents,
    features,
    forgotten,
    key_logs,
    load_inputs,
    load_tile,
    operand,
    put_normaliser,
    put_state,
    run_at,
    scaled_gradients,
    segment_held,
    through,
    transposed,
)
from longseq.attention.backends.triton.rows import product


@triton.jit(do_not_specialize=ANY_LENGTH)
def add_up_queries(
    q, dout, out, dlse, inverse_den, q_gauge, row_scale, begins, runs, decay, weight, shift, u, sums,
    length, delay, steps, m: tl.constexpr, d: tl.constexpr, e: tl.constexpr,
    EXPONENTIAL: tl.constexpr, SHIFTED: tl.constexpr, LOCAL: tl.constexpr, DLSE: tl.constexpr, RUNS: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Σ_i e^{c − M_i} φ(q_i) g_iᵀ of every ``steps`` chunks, c that before them; and g's last component u, (N, L)."""
    n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    block = tl.program_id(2) * F
    f = block + tl.arange(0, F)
    rows = tl.arange(0, C)
    at = n * length
    rate = tl.load(decay + n) if DECAY else 0.0
    if GATE:
        decay += at + n
    if LOCAL:
        c = tl.load(begins + n * (tl.num_programs(0) + 1) + part)
    state = tl.zeros((E, F), tl.float32)
    one = tl.zeros((F,), tl.float32)
    start = part * steps * C
    for chunk in tl.range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(length, C)), disable_licm=True):
        first = chunk * C
        real = rows < length - first
        here = at + first + rows
        gauge = tl.load(q_gauge + here, mask=real, other=0.0)
        tile = load_inputs(q + (at + first) * d, rows, real, d, HALF, D)
        u_ = exponents(tile, q + (at + first) * d, rows, real, weight, shift, block, length, m, d, SHIFTED, HALF, F, D)
        phi = operand(features(u_, gauge, f, m, EXPONENTIAL, F), HALF)
        # Rounded as for the products dout_iᵀv_j, from which dout_iᵀout_i is taken: most of both may cancel.
        grad = operand(load_tile(dout + (at + first) * e, rows, real, e, E), HALF)
        inverse = tl.load(inverse_den + here, mask=real, other=0.0)
        if tl.program_id(2) == 0:
            shared = -tl.sum(grad.to(tl.float32) * load_tile(out + (at + first) * e, rows, real, e, E), 1)
            if DLSE:
                shared += tl.load(dlse + here, mask=real, other=0.0)
            tl.store(u + here, shared * inverse, mask=real)
        carried = 1.0
        if LOCAL:
            scale = tl.load(row_scale + here, mask=real, other=INFINITY)
            carried = tl.exp(c - scale)
            if RUNS:
                own = tl.load(runs + here, mask=real, other=-2)
                carried = tl.where(own == run_at(runs + at, start - 1, delay, length), carried, 0.0)
        reading, last = scaled_gradients(
            grad, inverse * carried, out + (at + first) * e, dlse + at + first, rows, real, e, DLSE, HALF, E
        )
        one += tl.sum(phi.to(tl.float32) * last[:, None], 0)
        state = product(tl.trans(reading), phi, state)
        if DECAY:
            c = c - rate * C
        if GATE:
            c = c - forgotten(decay, first, first + C - delay, delay, length)
    put_state(sums + (n * tl.num_programs(0) + part) * m * (e + 1), f, state, m, e, F, E)
    put_normaliser(sums + (n * tl.num_programs(0) + part) * m * (e + 1), f, one, m, e, F)


@triton.jit(do_not_specialize=ANY_LENGTH)
def run_back(
    sums, begins, later, d_initial, states, final, flows, key_scale, before, runs, decay,
    length, delay, steps, segments, chunks, m: tl.constexpr, e: tl.constexpr,
    LATER: tl.constexpr, FLOW: tl.constexpr, STATES: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Replace R's shares by R behind each segment; what is left before the first is the initial state's gradient.

    WHOLE: R behind a segment is written for the log-scale that its chunks arrive at, see through, and not for that
    which the state behind it has: a decay leaves it between whole multiples, and each chunk takes the next one.
    FLOW: sums Σ S ⊙ R of the states between segments, times the way from one to the next, (N, programs) float64.
    """
    n = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * B + tl.arange(0, B)
    inside = x < m * (e + 1)
    there = n * m * (e + 1) + (transposed(x, m, e) if STATES else x)
    rate = tl.load(decay + n) if DECAY else 0.0
    if GATE:
        decay += n * (length + 1)
    state = tl.zeros((B,), tl.float32)
    flow = tl.full((), 0.0, tl.float64)
    if LATER:
        state = tl.load(later + there, mask=inside, other=0.0)
        if FLOW:
            way = length - delay - (segments - 1) * steps * C
            both = tl.sum(tl.load(final + there, mask=inside, other=0.0) * state, 0)
            flow -= way.to(tl.float64) * both.to(tl.float64)
    for back in range(segments):
        s = segments - 1 - back
        at = (n * segments + s) * m * (e + 1) + x
        part = tl.load(sums + at, mask=inside, other=0.0)
        begin = tl.load(begins + n * (segments + 1) + s)
        end = tl.load(begins + n * (segments + 1) + s + 1)
        if WHOLE and (DECAY or GATE):
            last = tl.minimum((s + 1) * steps, chunks) - 1
            rows = tl.arange(0, C)
            b = key_logs(key_scale + n * length, last * C, rows, delay, length)
            c = tl.load(before + n * chunks + last)
            arrived, _, _ = through(b, c, runs + n * length, last * C, rows, delay, length, RUNS, WHOLE)
            arrived = arrived - rate * C
            if GATE:
                arrived = arrived - forgotten(decay, last * C, last * C + C - delay, delay, length)
            tl.store(sums + at, state * tl.where(end < 0.5 * NOTHING, 1.0, tl.exp(arrived - end)), mask=inside)
        else:
            tl.store(sums + at, state, mask=inside)
        held, goes_on = segment_held(
            begin, runs + n * length, decay, s, delay, length, steps, chunks, rate, RUNS, GATE, C
        )
        state = state * tl.where(goes_on, tl.exp(held - end), 0.0) + part
        if FLOW:
            both = tl.sum(tl.load(states + at, mask=inside, other=0.0) * state, 0)
            flow -= tl.where(s > 0, steps * C, 0).to(tl.float64) * both.to(tl.float64)
    tl.store(d_initial + there, state, mask=inside)
    if FLOW:
        tl.store(flows + n * (tl.num_programs(0) + 2 * segments) + tl.program_id(0), flow)
