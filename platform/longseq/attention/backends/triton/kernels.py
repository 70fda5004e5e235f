"""Triton kernels of FAVOR+'s forward pass, which :mod:`.scan` launches; for names see :mod:`.chunk`.

:func:`add_up` forms the sums of each segment, :func:`run_through` turns them into the state before each, and
:func:`attend` goes through the chunks of a segment with that state, which it keeps up to date where it lies: one (m, e)
state a segment, used by one program, stays in the cache.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from longseq.attention.backends.triton.chunk import (
    ANY_LENGTH,
    INFINITY,
    LEAST,
    LN2,
    LOG2E,
    NOTHING,
    again,
    exponents,
    features,
    forgotten,
    key_logs,
    largest,
    late,
    load_inputs,
    load_state,
    load_tile,
    operand,
    put_normaliser,
    put_state,
    row_scales,
    seen_by,
    segment_held,
    state_reads,
    through,
    transposed,
)
from longseq.attention.backends.triton.rows import product, put_rows


@triton.jit(do_not_specialize=ANY_LENGTH)
def add_up(
    x, values, hidden, log_weight, last, runs, decay, weight, shift, gauge, log_scale, sums, scales,
    length, delay, steps, norm, log_constant, m: tl.constexpr, d: tl.constexpr, e: tl.constexpr,
    EXPONENTIAL: tl.constexpr, SHIFTED: tl.constexpr, GAUGED: tl.constexpr, HIDDEN: tl.constexpr,
    WEIGHTED: tl.constexpr, LAST: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    HALF: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Σ_j e^{b_j − c} φ(x_j) [v_j, last_j]ᵀ of every ``steps`` chunks, with c counted from the chunk behind them.

    Writes the rows' gauges and log-scales (N, L) as well, or reads those that it once wrote, if GAUGED. A log-scale is
    as seen from the start of the chunk that the key enters; exponential features take up its fraction, see through.
    """
    WHOLE: tl.constexpr = EXPONENTIAL and HALF
    n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    block = tl.program_id(2) * F
    f = block + tl.arange(0, F)
    rows = tl.arange(0, C)
    at = n * length
    rate = 0.0
    if DECAY:
        rate = tl.load(decay + n)
    if GATE:
        decay += at + n
    state = tl.zeros((E, F), tl.float32)
    one = tl.zeros((F,), tl.float32)
    c = tl.full((), NOTHING, tl.float32)
    for chunk in tl.range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(length, C)), disable_licm=True):
        first = chunk * C
        j = first + rows - delay
        visible = (j >= 0) & (first + rows < length)
        from_ = at + first - delay
        if GAUGED:
            b = key_logs(log_scale + at, first, rows, delay, length)
            visible = b != -INFINITY
            g = tl.load(gauge + from_ + rows, mask=visible, other=0.0)
            tile = load_inputs(x + from_ * d, rows, visible, d, HALF, D)
        else:
            there = visible
            if HIDDEN:
                visible = visible & (tl.load(hidden + from_ + rows, mask=there, other=1) == 0)
            if WEIGHTED:
                more = tl.load(log_weight + from_ + rows, mask=there, other=-INFINITY)
                visible = visible & (more != -INFINITY)
            tile = load_inputs(x + from_ * d, rows, visible, d, HALF, D)
            b = tl.zeros((C,), tl.float32) + log_constant
            g = tl.zeros((C,), tl.float32)
            if EXPONENTIAL:
                top = largest(
                    tile, x + from_ * d, rows, visible, weight, shift, length, m, d, SHIFTED, HALF,
                    F if F < 64 else 64, D,
                )  # fmt: skip
                g = top * LOG2E
                b += top - norm * tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
            if WEIGHTED:
                b += more
            if DECAY:
                b += rate * rows.to(tl.float32)
            if GATE:
                b += forgotten(decay, first, j + 1, delay, length)
            if WHOLE:
                whole = tl.ceil(b * LOG2E)
                g += tl.where(visible, whole - b * LOG2E, 0.0)
                b = whole * LN2
            b = tl.where(visible, b, -INFINITY)
            if tl.program_id(2) == 0:
                tl.store(gauge + from_ + rows, g, mask=there)
                tl.store(log_scale + from_ + rows, b, mask=there)
        c, entering, left = through(b, c, runs + at, first, rows, delay, length, RUNS, WHOLE)
        u = exponents(tile, x + from_ * d, rows, visible, weight, shift, block, length, m, d, SHIFTED, HALF, F, D)
        # Not the values: these are in 16 bits already, and would be rounded once more.
        phi = features(u, g, f, m, EXPONENTIAL, F) * entering[:, None]
        ends = phi
        if LAST:
            ends = phi * tl.load(last + from_ + rows, mask=visible, other=0.0)[:, None]
        one = one * left + tl.sum(ends, 0)
        value = operand(load_tile(values + from_ * e, rows, visible, e, E), HALF)
        state = product(tl.trans(value), operand(phi, HALF), state * left)
        if DECAY:
            c = c - rate * C
        if GATE:
            c = c - forgotten(decay, first, first + C - delay, delay, length)
    put_state(sums + (n * tl.num_programs(0) + part) * m * (e + 1), f, state, m, e, F, E)
    put_normaliser(sums + (n * tl.num_programs(0) + part) * m * (e + 1), f, one, m, e, F)
    if tl.program_id(2) == 0:
        tl.store(scales + n * tl.num_programs(0) + part, c)


@triton.jit(do_not_specialize=ANY_LENGTH)
def run_through(
    sums, scales, begins, initial, initial_scale, final, final_scale, runs, decay,
    length, delay, steps, segments, chunks, m: tl.constexpr, e: tl.constexpr,
    INITIAL: tl.constexpr, STATES: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Replace the sums of each segment by the state before it.

    begins: c before each segment, and behind the last: (N, segments + 1). initial, final: the states at both ends,
    (N, m, e + 1) with STATES, else as the sums; the final one seen from behind the last position.
    """
    n = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * B + tl.arange(0, B)
    inside = x < m * (e + 1)
    there = n * m * (e + 1) + (transposed(x, m, e) if STATES else x)
    rate = 0.0
    if DECAY:
        rate = tl.load(decay + n)
    if GATE:
        decay += n * (length + 1)
    state = tl.zeros((B,), tl.float32)
    c = tl.full((), NOTHING, tl.float32)
    if INITIAL:
        state = tl.load(initial + there, mask=inside, other=0.0)
        c = tl.load(initial_scale + n)
    for s in range(segments):
        at = sums + (n * segments + s) * m * (e + 1) + x
        part = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(begins + n * (segments + 1) + s, c)
        scale = tl.load(scales + n * segments + s)
        held, goes_on = segment_held(c, runs + n * length, decay, s, delay, length, steps, chunks, rate, RUNS, GATE, C)
        new = tl.maximum(tl.where(goes_on, held, NOTHING), scale)
        state = state * tl.where(goes_on, tl.exp(held - new), 0.0) + part * tl.exp(scale - new)
        c = new
    if tl.program_id(0) == 0:
        tl.store(begins + n * (segments + 1) + segments, c)
        c = c + rate * (chunks * C - length).to(tl.float32)
        if GATE:
            c = c - forgotten(decay, chunks * C, length - delay, delay, length)
        tl.store(final_scale + n, c)
    tl.store(final + there, state, mask=inside)


@triton.jit(do_not_specialize=ANY_LENGTH)
def attend(
    q, k, v, k_gauge, key_scale, runs, decay, weight, shift, sums, begins, q_gauge, row_scale, before,
    inverse_den, lse, out, length, delay, steps, norm, log_constant,
    m: tl.constexpr, d: tl.constexpr, e: tl.constexpr,
    EXPONENTIAL: tl.constexpr, SHIFTED: tl.constexpr, LOCAL: tl.constexpr, RUNS: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out, log-denominator, and for the backward pass 1/denominator, gauges, M and c, of one segment's queries.

    LOCAL: the state is that before the segment, and is left as it is before its last chunk. Otherwise one state is
    all keys.
    """
    n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    rows = tl.arange(0, C)
    at = n * length
    chunks = tl.cdiv(length, C)
    rate = 0.0
    if DECAY:
        rate = tl.load(decay + n)
    if GATE:
        decay += at + n
    if LOCAL:
        sums += (n * tl.num_programs(0) + part) * m * (e + 1)
        c = tl.load(begins + n * (tl.num_programs(0) + 1) + part)
    else:
        sums += n * m * (e + 1)
    stop = tl.minimum((part + 1) * steps, chunks)
    for chunk in tl.range(part * steps, stop, disable_licm=True):
        first = chunk * C
        real = rows < length - first
        tile = load_inputs(q + (at + first) * d, rows, real, d, HALF, D)
        q_scale = tl.zeros((C,), tl.float32) + log_constant
        gauge = tl.zeros((C,), tl.float32)
        if EXPONENTIAL:
            top = largest(tile, q + (at + first) * d, rows, real, weight, shift, length, m, d, SHIFTED, HALF, F, D)
            gauge = top * LOG2E
            q_scale += top - norm * tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        tl.store(q_gauge + at + first + rows, gauge, mask=real)
        if LOCAL:
            b = key_logs(key_scale + at, first, rows, delay, length)
            keep = b != -INFINITY  # a real key, not hidden
            from_ = at + first - delay
            new, entering, left = through(b, c, runs + at, first, rows, delay, length, RUNS, EXPONENTIAL and HALF)
            enters = operand(load_tile(v + from_ * e, rows, keep, e, E).to(tl.float32) * entering[:, None], HALF)
            tl.store(before + n * chunks + chunk, c)
            key_gauge = tl.load(k_gauge + from_ + rows, mask=keep, other=0.0)
            keys = load_inputs(k + from_ * d, rows, keep, d, HALF, D)
            attention = tl.zeros((C, C), tl.float32)
        num = tl.zeros((C, E), tl.float32)
        den = tl.zeros((C,), tl.float32)
        for block in tl.range(0, m, F, disable_licm=True):
            f = block + tl.arange(0, F)
            # The state is done with before the queries' features are made: both would overflow the registers.
            if LOCAL:
                u = exponents(keys, k + from_ * d, rows, keep, weight, shift, block, length, m, d, SHIFTED, HALF, F, D)
                key_phi = features(u, key_gauge, f, m, EXPONENTIAL, F)
                key_features = operand(key_phi, HALF)
                one_more = tl.sum(key_phi * entering[:, None], 0)
            state, one = load_state(sums, f, m, e, F, E)
            read_state = operand(state, HALF)
            if LOCAL:
                turned = tl.trans(again(enters, block, length, HALF))
                if chunk + 1 < stop:
                    tl.debug_barrier()  # before others have read the normaliser
                    put_normaliser(sums, f, one * left + one_more, m, e, F)
                    put_state(sums, f, product(turned, key_features, state * left), m, e, F, E)
            u = exponents(
                tile, q + (at + first) * d, rows, real, weight, shift, block, length, m, d, SHIFTED, HALF, F, D
            )
            phi = features(u, gauge, f, m, EXPONENTIAL, F)
            queries = operand(phi, HALF)
            den += tl.sum(queries.to(tl.float32) * one[None, :], 1)
            num = product(queries, tl.trans(read_state), num)
            if HALF and not LOCAL:
                num = product(queries, tl.trans(operand(state - read_state.to(tl.float32), HALF)), num)
            if LOCAL:
                attention = product(queries, tl.trans(key_features), attention)
        if LOCAL and (D > 64 or E > 64):
            first = late(first, chunk, length, C)
            real = rows < length - first
            from_ = at + first - delay
        if LOCAL:
            # Loaded again: it would be in registers all through the loop.
            b = key_logs(key_scale + at, first, rows, delay, length)
            if D > 64 or E > 64:
                keep = b != -INFINITY
            reads = state_reads(runs + at, first, rows, delay, length, RUNS)
            scale = row_scales(b, tl.where(reads, c, NOTHING), runs + at, first, rows, delay, length, RUNS)
            tl.store(row_scale + at + first + rows, scale, mask=real)
            carried = tl.where(reads, tl.exp(c - scale), 0.0)
            seen = seen_by(runs + at, first, rows, delay, length, RUNS)
            attention *= tl.where(seen, tl.exp2(b[None, :] * LOG2E - scale[:, None] * LOG2E), 0.0)
            value = load_tile(v + from_ * e, rows, keep, e, E)
            # The denominator sums what is multiplied: most of both may cancel in the backward pass.
            weights = operand(attention, HALF)
            num = product(weights, operand(value, HALF), num * carried[:, None])
            den = den * carried + tl.sum(weights.to(tl.float32), 1)
            log_den = tl.log(den) + scale + q_scale
            if DECAY:
                log_den -= rate * (rows + delay).to(tl.float32)
            if GATE:
                log_den -= forgotten(decay, first, first + rows + 1, delay, length)
            tl.store(lse + at + first + rows, tl.where(den < LEAST, NOTHING, log_den), mask=real)
            c = new
            if DECAY:
                c = c - rate * C
            if GATE:
                c = c - forgotten(decay, first, first + C - delay, delay, length)
            tl.debug_barrier()  # before others read what this thread has written of the state
        inverse = tl.where(den < LEAST, 0.0, 1.0 / den)
        tl.store(inverse_den + at + first + rows, inverse, mask=real)
        put_rows(out + (at + first) * e, rows, real, e, num * inverse[:, None], E)
