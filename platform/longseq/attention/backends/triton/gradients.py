"""Triton kernels of FAVOR+'s backward pass, from R of the segments on: for names see :mod:`.chunk`.

:func:`queries_vjp` goes through the chunks of a segment with S, and :func:`keys_vjp` from the last to the first with R.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from longseq.attention.backends.triton.chunk import (
    ANY_LENGTH,
    EPSILON,
    INFINITY,
    LOG2E,
    again,
    exponents,
    features,
    key_logs,
    late,
    load_inputs,
    load_state,
    load_tile,
    operand,
    put_normaliser,
    put_state,
    scaled_gradients,
    seen_by,
    state_reads,
    through,
    visible_weights,
)
from longseq.attention.backends.triton.rows import product, put_rows


@triton.jit(do_not_specialize=ANY_LENGTH)
def queries_vjp(
    q, k, v, dout, out, dlse, q_gauge, k_gauge, key_scale, row_scale, inverse_den, u, runs, decay, before, weight,
    shift, sums, dq, flows, length, delay, steps, others, norm, m: tl.constexpr, d: tl.constexpr, e: tl.constexpr,
    EXPONENTIAL: tl.constexpr, SHIFTED: tl.constexpr, LOCAL: tl.constexpr, DLSE: tl.constexpr, FLOW: tl.constexpr,
    RUNS: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    HALF: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dq of one segment:

        dφ(q_i) = Σ_j dA_ij φ(k_j) + e^{c − M_i} S g_i,    dA_ij = (dout_iᵀv_j / ñ_i[e] + u_i) · exp(b_j − M_i)

    The state before the segment is left as it is before its last chunk. FLOW: the queries' share of the decay's
    gradient, −Σ_i i Σ_j dA_ij A_ij, counted from the segment's start. The inner sum is dlse_i, but what is taken is
    the sum of what :func:`keys_vjp` adds up by keys: a pair's rounding error must count by its distance, not its place.
    What the sum is off dlse_i is taken away again at about the mean distance of the keys that the query sees.
    With GATE these sums themselves, (N, L).
    """
    n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    rows = tl.arange(0, C)
    at = n * length
    chunks = tl.cdiv(length, C)
    rate = tl.load(decay + n) if DECAY else 0.0
    if LOCAL:
        sums += (n * tl.num_programs(0) + part) * m * (e + 1)
    else:
        sums += n * m * (e + 1)
    stop = tl.minimum((part + 1) * steps, chunks)
    flow = tl.full((), 0.0, tl.float64)
    for chunk in tl.range(part * steps, stop, disable_licm=True):
        first = chunk * C
        real = rows < length - first
        here = at + first + rows
        grad = operand(load_tile(dout + (at + first) * e, rows, real, e, E), HALF)
        inverse = tl.load(inverse_den + here, mask=real, other=0.0)
        shared = tl.load(u + here, mask=real, other=0.0)
        carried = 1.0
        if LOCAL:
            b = key_logs(key_scale + at, first, rows, delay, length)
            keep = b != -INFINITY
            from_ = at + first - delay
            value = load_tile(v + from_ * e, rows, keep, e, E)
            scale = tl.load(row_scale + here, mask=real, other=INFINITY)
            seen = seen_by(runs + at, first, rows, delay, length, RUNS)
            d_attention = product(grad, tl.trans(operand(value, HALF))) * inverse[:, None]
            d_attention += shared[:, None]
            d_attention *= tl.where(seen, tl.exp2(b[None, :] * LOG2E - scale[:, None] * LOG2E), 0.0)
            d_weights = operand(d_attention, HALF)
            c = tl.load(before + n * chunks + chunk)
            _, entering, left = through(b, c, runs + at, first, rows, delay, length, RUNS, EXPONENTIAL and HALF)
            enters = operand(value.to(tl.float32) * entering[:, None], HALF)
            reads = state_reads(runs + at, first, rows, delay, length, RUNS)
            carried = tl.where(reads, tl.exp(c - scale), 0.0)
        reading, read_one = scaled_gradients(
            grad, inverse * carried, out + (at + first) * e, dlse + at + first, rows, real, e, DLSE, HALF, E
        )
        # Loaded here and not before: all rows at once would overflow the registers.
        gauge = tl.load(q_gauge + here, mask=real, other=0.0)
        tile = load_inputs(q + (at + first) * d, rows, real, d, HALF, D)
        if LOCAL:
            key_gauge = tl.load(k_gauge + from_ + rows, mask=keep, other=0.0)
            keys = load_inputs(k + from_ * d, rows, keep, d, HALF, D)
        gradient = tl.zeros((C, D), tl.float32)
        row_sum = tl.zeros((C,), tl.float32)
        for block in tl.range(0, m, F, disable_licm=True):
            f = block + tl.arange(0, F)
            if LOCAL:
                key_u = exponents(
                    keys, k + from_ * d, rows, keep, weight, shift, block, length, m, d, SHIFTED, HALF, F, D
                )
                key_phi = features(key_u, key_gauge, f, m, EXPONENTIAL, F)
                key_features = operand(key_phi, HALF)
                one_more = tl.sum((key_features.to(tl.float32) if FLOW else key_phi) * entering[:, None], 0)
            state, one = load_state(sums, f, m, e, F, E)
            read_state = operand(state, HALF)
            if HALF and (FLOW or not LOCAL):
                rest = operand(state - read_state.to(tl.float32), HALF)
            if LOCAL:
                turned = tl.trans(again(enters, block, length, HALF))
                if chunk + 1 < stop:
                    tl.debug_barrier()  # before others have read the normaliser
                    put_normaliser(sums, f, one * left + one_more, m, e, F)
                    put_state(sums, f, product(turned, key_features, state * left), m, e, F, E)
            d_phi = product(again(reading, block, length, HALF), read_state)
            if HALF and (FLOW or not LOCAL):
                d_phi = product(reading, rest, d_phi)
            d_phi += read_one[:, None] * one[None, :]
            if LOCAL:
                d_phi = product(again(d_weights, block, length, HALF), key_features, d_phi)
            query_u = exponents(
                tile, q + (at + first) * d, rows, real, weight, shift, block, length, m, d, SHIFTED, HALF, F, D
            )
            phi = features(query_u, gauge, f, m, EXPONENTIAL, F)
            d_log = d_phi * phi
            if FLOW:
                # Of the features that the other side sees: the sum of a pair's terms is the same from either.
                row_sum += tl.sum(d_phi * operand(phi, HALF).to(tl.float32), 1)
            elif EXPONENTIAL:
                row_sum += tl.sum(d_log, 1)
            if not EXPONENTIAL:
                d_log = tl.where(phi > EPSILON, d_phi, 0.0)
            w = load_tile(weight, f, f < m, d, D)
            gradient = product(operand(d_log, HALF), operand(w, HALF), gradient)
        if not FLOW:
            first = late(first, chunk, length, C)
            real = rows < length - first
        if EXPONENTIAL:
            gradient -= (norm * row_sum)[:, None] * load_tile(q + (at + first) * d, rows, real, d, D).to(tl.float32)
        put_rows(dq + (at + first) * d, rows, real, d, gradient, D)
        if FLOW and GATE:
            tl.store(flows + here, row_sum, mask=real)
        elif FLOW:
            place = (chunk - part * steps) * C + rows
            flow -= tl.sum(row_sum.to(tl.float64) * place.to(tl.float64), 0)
            if DLSE:
                row_sum -= tl.load(dlse + here, mask=real, other=0.0)
            mean = delay + tl.minimum(0.5 * (first + rows).to(tl.float32), 1.0 / rate)
            flow += tl.sum(tl.where(inverse > 0.0, row_sum * mean, 0.0).to(tl.float64), 0)
        if LOCAL:
            tl.debug_barrier()  # before others read what this thread has written of the state
    if FLOW and not GATE:
        tl.store(flows + n * (others + 2 * tl.num_programs(0)) + others + part, flow)


@triton.jit(do_not_specialize=ANY_LENGTH)
def keys_vjp(
    q, k, v, dout, out, dlse, q_gauge, k_gauge, key_scale, row_scale, inverse_den, u, final_scale, runs, before,
    weight, shift, sums, dk, dv, flows, length, delay, steps, others, norm,
    m: tl.constexpr, d: tl.constexpr, e: tl.constexpr,
    EXPONENTIAL: tl.constexpr, SHIFTED: tl.constexpr, LOCAL: tl.constexpr, DLSE: tl.constexpr, FLOW: tl.constexpr,
    RUNS: tl.constexpr, GATE: tl.constexpr, ROOM: tl.constexpr,
    HALF: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dk and dv of one segment, with dA as in :func:`queries_vjp`:

        dφ(k_j) = Σ_i dA_ij φ(q_i) + e^{b_j − c'} R ṽ_j,    dv_j = Σ_i A_ij g_i + e^{b_j − c'} Rᵀφ(k_j)

    R is that behind the segment, and is left as it is behind its first chunk. FLOW: the keys' share of the decay's
    gradient, Σ_j (j + delay) Σ_i dA_ij A_ij, counted from the segment's start; with GATE the inner sums, (N, L).
    ROOM: R goes on before the keys' features are made. 16-bit products from registers (sm_80) leave no room for that:
    R goes on last.
    """
    n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    rows = tl.arange(0, C)
    at = n * length
    chunks = tl.cdiv(length, C)
    if LOCAL:
        sums += (n * tl.num_programs(0) + part) * m * (e + 1)
    else:
        sums += n * m * (e + 1)
    start = part * steps
    stop = tl.minimum(start + steps, chunks)
    flow = tl.full((), 0.0, tl.float64)
    for back in tl.range(0, stop - start, disable_licm=True):
        chunk = stop - 1 - back
        first = chunk * C
        from_ = at + first - delay
        b = key_logs(key_scale + at, first, rows, delay, length)
        keep = b != -INFINITY
        value = load_tile(v + from_ * e, rows, keep, e, E)
        if LOCAL:
            real = rows < length - first
            here = at + first + rows
            grad = operand(load_tile(dout + (at + first) * e, rows, real, e, E), HALF)
            inverse = tl.load(inverse_den + here, mask=real, other=0.0)
            shared = tl.load(u + here, mask=real, other=0.0)
            scale = tl.load(row_scale + here, mask=real, other=INFINITY)
            # (queries, keys), and turned over where it is used: so it waits in shared memory, not in registers.
            d_attention = product(grad, tl.trans(operand(value, HALF))) * inverse[:, None]
            seen = seen_by(runs + at, first, rows, delay, length, RUNS)
            weights = tl.where(seen, tl.exp2(b[None, :] * LOG2E - scale[:, None] * LOG2E), 0.0)
            d_weights = operand((d_attention + shared[:, None]) * weights, HALF)
            c = tl.load(before + n * chunks + chunk)
            _, entering, left = through(b, c, runs + at, first, rows, delay, length, RUNS, EXPONENTIAL and HALF)
            reads = state_reads(runs + at, first, rows, delay, length, RUNS)
            carried = tl.where(reads, tl.exp(c - scale), 0.0)
            reading, read_one = scaled_gradients(
                grad, inverse * carried, out + (at + first) * e, dlse + at + first, rows, real, e, DLSE, HALF, E
            )
            attention = tl.zeros((C, C), tl.float32)
        else:
            entering = tl.exp(b - tl.load(final_scale + n))
        values = operand(value, HALF)
        # Loaded here and not before: all rows at once would overflow the registers.
        key_gauge = tl.load(k_gauge + from_ + rows, mask=keep, other=0.0)
        keys = load_inputs(k + from_ * d, rows, keep, d, HALF, D)
        if LOCAL:
            gauge = tl.load(q_gauge + here, mask=real, other=0.0)
            tile = load_inputs(q + (at + first) * d, rows, real, d, HALF, D)
        gradient = tl.zeros((C, D), tl.float32)
        d_value = tl.zeros((C, E), tl.float32)
        row_sum = tl.zeros((C,), tl.float32)
        for block in tl.range(0, m, F, disable_licm=True):
            f = block + tl.arange(0, F)
            if LOCAL:
                query_u = exponents(
                    tile, q + (at + first) * d, rows, real, weight, shift, block, length, m, d, SHIFTED, HALF, F, D
                )
                query_phi = features(query_u, gauge, f, m, EXPONENTIAL, F)
                queries = operand(query_phi, HALF)
                one_more = tl.sum(queries.to(tl.float32) * read_one[:, None], 0)
            state, one = load_state(sums, f, m, e, F, E)
            read_state = operand(state, HALF)
            if HALF and (ROOM or FLOW or not LOCAL):
                rest = operand(state - read_state.to(tl.float32), HALF)
            if not ROOM:
                d_phi = product(again(values, block, length, HALF), read_state)
                if HALF and (FLOW or not LOCAL):
                    d_phi = product(values, rest, d_phi)
                d_phi = (d_phi + one[None, :]) * entering[:, None]
            elif LOCAL:
                turned = tl.trans(again(reading, block, length, HALF))
                if back + 1 < stop - start:
                    tl.debug_barrier()  # before others have read the normaliser
                    put_normaliser(sums, f, one * left + one_more, m, e, F)
                    put_state(sums, f, product(turned, queries, state * left), m, e, F, E)
            key_u = exponents(keys, k + from_ * d, rows, keep, weight, shift, block, length, m, d, SHIFTED, HALF, F, D)
            phi = features(key_u, key_gauge, f, m, EXPONENTIAL, F)
            key_features = operand(phi, HALF)
            d_value = product(key_features, tl.trans(read_state), d_value)
            if LOCAL:
                attention = product(key_features, tl.trans(queries), attention)
            if ROOM:
                d_phi = product(again(values, block, length, HALF), read_state)
                if HALF:
                    d_phi = product(values, rest, d_phi)
                d_phi = (d_phi + one[None, :]) * entering[:, None]
            if LOCAL:
                d_phi = product(tl.trans(again(d_weights, block, length, HALF)), queries, d_phi)
                if not ROOM:
                    turned = tl.trans(again(reading, block, length, HALF))
                    if back + 1 < stop - start:
                        tl.debug_barrier()
                        put_normaliser(sums, f, one * left + one_more, m, e, F)
                        put_state(sums, f, product(turned, queries, state * left), m, e, F, E)
            d_log = d_phi * phi
            if FLOW:
                # Of the features that the other side sees: the sum of a pair's terms is the same from either.
                row_sum += tl.sum(d_phi * operand(phi, HALF).to(tl.float32), 1)
            elif EXPONENTIAL:
                row_sum += tl.sum(d_log, 1)
            if not EXPONENTIAL:
                d_log = tl.where(phi > EPSILON, d_phi, 0.0)
            w = load_tile(weight, f, f < m, d, D)
            gradient = product(operand(d_log, HALF), operand(w, HALF), gradient)
        if LOCAL:
            first = late(first, back, length, C)
            from_ = at + first - delay
            here = at + first + rows
            real = rows < length - first
            b = key_logs(key_scale + at, first, rows, delay, length)
            keep = b != -INFINITY
        if EXPONENTIAL:
            gradient -= (norm * row_sum)[:, None] * load_tile(k + from_ * d, rows, keep, d, D).to(tl.float32)
        d_value *= entering[:, None]
        if LOCAL:
            scale = tl.load(row_scale + here, mask=real, other=INFINITY)
            inverse = tl.load(inverse_den + here, mask=real, other=0.0)
            weights = visible_weights(b, scale, runs + at, first, rows, delay, length, RUNS)
            attention *= weights * inverse[None, :]
            grad = load_tile(dout + (at + first) * e, rows, real, e, E)
            d_value = product(operand(attention, HALF), operand(grad, HALF), d_value)
        written = (first + rows - delay >= 0) & (first + rows < length)
        put_rows(dk + from_ * d, rows, written, d, gradient, D)
        put_rows(dv + from_ * e, rows, written, e, d_value, E)
        if LOCAL and first + C > length - delay:
            # The keys at the end, which no query is far enough from, are of the queries' chunk there.
            unseen = (first + rows < length) & (first + rows >= length - delay)
            put_rows(dk + (at + first) * d, rows, unseen, d, tl.zeros((C, D), tl.float32), D)
            put_rows(dv + (at + first) * e, rows, unseen, e, tl.zeros((C, E), tl.float32), E)
        if FLOW and GATE:
            tl.store(flows + from_ + rows, row_sum, mask=written)
        elif FLOW:
            place = (chunk - start) * C + rows
            flow += tl.sum(row_sum.to(tl.float64) * (place - delay).to(tl.float64), 0)
        if LOCAL:
            tl.debug_barrier()  # before others read what this thread has written of the state
    if FLOW and not GATE:
        segments = tl.num_programs(0)
        tl.store(flows + n * (others + 2 * segments) + others + segments + part, flow)
