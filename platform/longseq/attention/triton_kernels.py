"""Triton kernels of FAVOR+: what :mod:`longseq.attention.triton_backend` launches, forward and backward.

The features φ of a tile of rows are computed where they are used and live in registers; what goes to memory are
(N, L) numbers and one (m, e) state a chunk.

Loops over blocks of features load q, k and v again in every turn, from the nearest cache: ``zero``, an argument that
is 0, keeps the compiler from carrying those tiles through the loop in registers that it does not have.

Names: C rows of a chunk, F features of a block, D and E the widths d and e padded to powers of two. Rows of queries
are counted by position i, keys by the position t = j + delay at which they become visible: query i sees t ≤ i.
Vectors "of positions" are (N, T), T the length padded to whole chunks.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import triton
import triton.language as tl

# Three TF32 products on tensor cores add up to nearly fp32 (relative error 1e-6); a single one has an error of 5e-4,
# and an exponent of size 20 would turn it into 1 %. The interpreter multiplies in fp32 whatever this says.
PRECISION = tl.constexpr("tf32x3")
LOG_FLOOR = tl.constexpr(-40.0)  # as in feature_maps: e^-40 of the sum of a row is the least feature
EPSILON = tl.constexpr(1e-3)  # as in feature_maps: relu(u) + ε
NOTHING = tl.constexpr(-1e30)  # as in state: the log-scale of an empty state
LEAST = tl.constexpr(1.1754943508222875e-38**0.75)  # as in state.inverse: a denominator below has seen no key
# Columns of q, k, v multiplied at a time. All of a tile, split into three TF32 parts, would overflow the registers.
SLICE = tl.constexpr(32)
INFINITY = tl.constexpr(math.inf)


@triton.jit
def load_rows(base, rows, keep, width, first, COLUMNS: tl.constexpr):
    """Columns ``first``… of rows of a matrix ``width`` wide; zeros where not to keep, and not even read there."""
    columns = first + tl.arange(0, COLUMNS)
    return tl.load(
        base + rows[:, None] * width + columns[None, :], mask=keep[:, None] & (columns < width)[None, :], other=0.0
    )


@triton.jit
def put_rows(base, rows, keep, width, values, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    tl.store(base + rows[:, None] * width + columns[None, :], values, mask=keep[:, None] & (columns < width)[None, :])


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rows_product(a, a_rows, a_keep, b, b_rows, b_keep, width, WIDTH: tl.constexpr):
    """Products of rows of two matrices, (len(a_rows), len(b_rows)), a slice of their columns at a time."""
    STEP: tl.constexpr = WIDTH if WIDTH < SLICE else SLICE
    total = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for first in tl.static_range(0, WIDTH, STEP):
        part = load_rows(a, a_rows, a_keep, width, first, STEP)
        total += product(part, tl.trans(load_rows(b, b_rows, b_keep, width, first, STEP)))
    return total


@triton.jit
def _bounded(u, gauge, real, EXPONENTIAL: tl.constexpr):
    """Features of u = ωᵀx + shift, zero where not real. Comparisons, unlike maxima, let a NaN through."""
    if EXPONENTIAL:
        u = u - gauge
        phi = tl.exp(tl.where(u < LOG_FLOOR, LOG_FLOOR, u))
    else:
        phi = tl.where(u < 0.0, 0.0, u) + EPSILON
    return tl.where(real, phi, 0.0)


@triton.jit
def _phi(x, rows, keep, gauge, weight, shift, f, m, d, EXPONENTIAL: tl.constexpr, D: tl.constexpr):
    """Features f of rows of x: (rows, features)."""
    u = rows_product(x, rows, keep, weight, f, f < m, d, D) + tl.load(shift + f, mask=f < m, other=0.0)[None, :]
    return _bounded(u, gauge[:, None], (f < m)[None, :], EXPONENTIAL)


@triton.jit
def measure(
    x, hidden, weight, shift, gauge, log_scale, length, m, d, zero, norm, log_constant,
    EXPONENTIAL: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The log-sum of each row's exponentials, its ``gauge``, and its log-scale, −inf where hidden: (N, L)."""
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * C
    rows = tl.arange(0, C)
    keep = rows < length - first
    at = n * length + first
    visible = keep
    if HIDDEN:
        visible = keep & (tl.load(hidden + at + rows, mask=keep, other=1) == 0)
    log_sum = tl.zeros((C,), tl.float32)
    scale = tl.zeros((C,), tl.float32) + log_constant
    if EXPONENTIAL:
        top = tl.full((C,), NOTHING, tl.float32)
        total = tl.zeros((C,), tl.float32)
        for block in range(0, m, F):
            f = block + tl.arange(0, F)
            u = rows_product(x + at * d + block * zero, rows, visible, weight, f, f < m, d, D)
            u = tl.where((f < m)[None, :], u + tl.load(shift + f, mask=f < m, other=0.0)[None, :], NOTHING)
            new_top = tl.maximum(top, tl.max(u, 1))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(u - new_top[:, None]), 1)
            top = new_top
        log_sum = top + tl.log(total)
        tile = load_rows(x + at * d, rows, visible, d, 0, D)
        scale += log_sum - norm * tl.sum(tile * tile, 1)
    tl.store(gauge + at + rows, log_sum, mask=keep)
    tl.store(log_scale + at + rows, tl.where(visible, scale, -INFINITY), mask=keep)


@triton.jit
def carry(chunk_scale, same, fade, initial, before, after, chunks, RUNS: tl.constexpr):
    """The running log-scale c before each chunk and c' after it, (N, chunks); one program a row of N."""
    n = tl.program_id(0).to(tl.int64)
    step = tl.load(fade + n)
    c = tl.load(initial + n)
    for chunk in range(chunks):
        at = n * chunks + chunk
        tl.store(before + at, c)
        if RUNS:
            c = tl.where(tl.load(same + at) != 0, c, NOTHING)
        c = tl.maximum(c, tl.load(chunk_scale + at))
        tl.store(after + at, c)
        c = c - step


@triton.jit
def add_up(
    x, values, alpha, beta, gauge, weight, shift, sums, ones, length, total, offset, span, m, d, e,
    EXPONENTIAL: tl.constexpr, C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The sums Σ_t α_t φ(x_t) v_tᵀ (m, e) and Σ_t β_t φ(x_t) (m,) of every ``span`` positions; rows are t − offset."""
    n = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    f = tl.program_id(2) * F + tl.arange(0, F)
    s = tl.load(shift + f, mask=f < m, other=0.0)
    state = tl.zeros((F, E), tl.float32)
    one = tl.zeros((F,), tl.float32)
    for first in range(part * span, tl.minimum((part + 1) * span, total), C):
        t = tl.arange(0, C)
        inside = t < total - first
        a = tl.load(alpha + n * total + first + t, mask=inside, other=0.0)
        b = tl.load(beta + n * total + first + t, mask=inside, other=0.0)
        keep = a != 0.0  # false for hidden rows, those of another document, and where there is no row
        at = n * length + first - offset
        value = load_rows(values + at * e, t, keep, e, 0, E)
        u = rows_product(weight, f, f < m, x + at * d, t, keep, d, D) + s[:, None]
        g = tl.load(gauge + at + t, mask=keep, other=0.0)
        phi = _bounded(u, g[None, :], (f < m)[:, None], EXPONENTIAL)  # (F, C)
        state += product(phi, value * a[:, None])
        one += tl.sum(phi * b[None, :], 1)
    at = (n * tl.num_programs(0) + part) * m
    put_rows(sums + at * e, f, f < m, e, state, E)
    tl.store(ones + at + f, one, mask=f < m)


@triton.jit
def run_through(parts, initial, final, left, chunks, width, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace the sum of each chunk by the running sum before it: state ← left · state + part, in either direction.

    The state begins as ``initial`` and is left in ``final``, (N, width) both.
    """
    n = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = columns < width
    state = tl.load(initial + n * width + columns, mask=keep, other=0.0)
    for step in range(chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        at = n * chunks + chunk
        pointers = parts + at * width + columns
        part = tl.load(pointers, mask=keep, other=0.0)
        tl.store(pointers, state, mask=keep)
        state = state * tl.load(left + at) + part
    tl.store(final + n * width + columns, state, mask=keep)


@triton.jit
def _seen(runs, at, rows, delay, first, length, RUNS: tl.constexpr):
    """Which query of a chunk sees which of its keys: (queries, keys)."""
    seen = rows[:, None] >= rows[None, :]
    if RUNS:
        q_run = tl.load(runs + at + rows, mask=rows < length - first, other=-2)
        keys = first + rows - delay
        k_run = tl.load(runs + at + rows - delay, mask=(keys >= 0) & (keys < length), other=-1)
        seen = seen & (q_run[:, None] == k_run[None, :])
    return seen


@triton.jit
def attend(
    q, k, v, q_gauge, q_scale, k_gauge, key_scale, runs, before, run_before, weight, shift, sums, ones,
    out, lse, inverse_den, row_scale, length, delay, m, d, e, zero,
    EXPONENTIAL: tl.constexpr, LOCAL: tl.constexpr, RUNS: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """out, log-denominator, and for the backward pass 1/denominator and M (of positions), of one chunk of queries.

    LOCAL: the state is that before the chunk, and the chunk's own keys are seen too. Otherwise one state is all keys.
    """
    n = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    first = chunk * C
    rows = tl.arange(0, C)
    real = rows < length - first
    at = n * length + first
    positions = (n * chunks + chunk) * C + rows
    state = n
    gauge = tl.load(q_gauge + at + rows, mask=real, other=0.0)
    if LOCAL:
        state = n * chunks + chunk
        b = tl.load(key_scale + positions)
        keep = b != -INFINITY  # a real key, not hidden
        key_gauge = tl.load(k_gauge + at - delay + rows, mask=keep, other=0.0)
        attention = tl.zeros((C, C), tl.float32)
    num = tl.zeros((C, E), tl.float32)
    den = tl.zeros((C,), tl.float32)
    for block in range(0, m, F):
        f = block + tl.arange(0, F)
        phi = _phi(q + at * d + block * zero, rows, real, gauge, weight, shift, f, m, d, EXPONENTIAL, D)
        num += product(phi, load_rows(sums + state * m * e, f, f < m, e, 0, E))
        den += tl.sum(phi * tl.load(ones + state * m + f, mask=f < m, other=0.0)[None, :], 1)
        if LOCAL:
            keys = k + (at - delay) * d + block * zero
            key_phi = _phi(keys, rows, keep, key_gauge, weight, shift, f, m, d, EXPONENTIAL, D)
            attention += product(phi, tl.trans(key_phi))
    if LOCAL:
        seen = _seen(runs, n * length + first, rows, delay, first, length, RUNS)
        visible = tl.where(seen, b[None, :], -INFINITY)
        c = tl.load(before + state)
        reads = rows >= 0  # beyond the length too, or M would be too small for the state
        if RUNS:
            reads = tl.load(runs + at + rows, mask=real, other=-2) == tl.load(run_before + state)
        scale = tl.maximum(tl.max(visible, 1), tl.where(reads, c, NOTHING))
        carried = tl.where(reads, tl.exp(c - scale), 0.0)
        attention *= tl.exp(visible - scale[:, None])
        num = num * carried[:, None] + product(attention, load_rows(v + (at - delay) * e, rows, keep, e, 0, E))
        den = den * carried + tl.sum(attention, 1)
        tl.store(row_scale + positions, scale)
        log_den = tl.log(den) + scale + tl.load(q_scale + at + rows, mask=real, other=0.0)
        tl.store(lse + at + rows, tl.where(den < LEAST, NOTHING, log_den), mask=real)
    inverse = tl.where((den < LEAST) | (rows >= length - first), 0.0, 1.0 / den)
    tl.store(inverse_den + positions, inverse)
    put_rows(out + at * e, rows, real, e, num * inverse[:, None], E)


@triton.jit
def values_vjp(
    q, k, v, dout, q_gauge, k_gauge, key_scale, runs, row_scale, inverse_den, alpha, weight, shift, sums,
    dv, length, delay, m, d, e, zero,
    EXPONENTIAL: tl.constexpr, LOCAL: tl.constexpr, RUNS: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dv of one chunk of keys: from the queries of its chunk if LOCAL, and from the state R of all later ones."""
    n = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    first = chunk * C
    rows = tl.arange(0, C)
    at = n * length + first
    positions = (n * chunks + chunk) * C + rows
    state = n
    b = tl.load(key_scale + positions)
    keep = b != -INFINITY
    gauge = tl.load(k_gauge + at - delay + rows, mask=keep, other=0.0)
    if LOCAL:
        state = n * chunks + chunk
        real = rows < length - first
        query_gauge = tl.load(q_gauge + at + rows, mask=real, other=0.0)
        attention = tl.zeros((C, C), tl.float32)  # (keys, queries)
    grad = tl.zeros((C, E), tl.float32)
    for block in range(0, m, F):
        f = block + tl.arange(0, F)
        keys = k + (at - delay) * d + block * zero
        phi = _phi(keys, rows, keep, gauge, weight, shift, f, m, d, EXPONENTIAL, D)
        grad += product(phi, load_rows(sums + state * m * e, f, f < m, e, 0, E))
        if LOCAL:
            queries = q + at * d + block * zero
            query_phi = _phi(queries, rows, real, query_gauge, weight, shift, f, m, d, EXPONENTIAL, D)
            attention += product(phi, tl.trans(query_phi))
    grad *= tl.load(alpha + positions)[:, None]
    if LOCAL:
        seen = tl.trans(_seen(runs, n * length + first, rows, delay, first, length, RUNS))
        exponent = tl.where(seen, b[:, None] - tl.load(row_scale + positions)[None, :], -INFINITY)
        attention *= tl.exp(exponent) * tl.load(inverse_den + positions)[None, :]
        grad += product(attention, load_rows(dout + at * e, rows, real, e, 0, E))
    written = (first + rows - delay >= 0) & (first + rows - delay < length)
    put_rows(dv + (at - delay) * e, rows, written, e, grad, E)


@triton.jit
def features_vjp(
    q, k, v, dout, q_gauge, k_gauge, key_scale, runs, row_scale, inverse_den, u, alpha, beta, weight, shift, sums, ones,
    dx, d_scale, length, delay, m, d, e, zero, norm,
    EXPONENTIAL: tl.constexpr, KEYS: tl.constexpr, LOCAL: tl.constexpr, RUNS: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dq of one chunk, or with KEYS its dk, and Σ_f dφ·φ of each key (``d_scale``, of positions).

    With x the rows in question, y those of the other side, a and b their dout or v,

        dφ(x) = Σ_y dA_xy φ(y) + α_x S a_x + β_x z,    dA_ij = (inverse_i · dout_iᵀv_j + u_i) · exp(b_j − M_i)

    S, z being the state before the chunk (queries), or the sums R over the queries after it (keys).
    """
    n = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    first = chunk * C
    rows = tl.arange(0, C)
    real = rows < length - first
    at = n * length + first
    positions = (n * chunks + chunk) * C + rows
    state = n
    if LOCAL:
        state = n * chunks + chunk
    # The rows in question: x, with the values a they are multiplied by; and the rows y of the other side.
    if KEYS:
        x, a, y, b = k + (at - delay) * d, v + (at - delay) * e, q + at * d, dout + at * e
    else:
        x, a, y, b = q + at * d, dout + at * e, k + (at - delay) * d, v + (at - delay) * e
    keep, other_keep = real, real
    if KEYS or LOCAL:
        key_log = tl.load(key_scale + positions)
        visible = key_log != -INFINITY
        key_gauge = tl.load(k_gauge + at - delay + rows, mask=visible, other=0.0)
    if LOCAL or not KEYS:
        query_gauge = tl.load(q_gauge + at + rows, mask=real, other=0.0)
    if KEYS:
        keep, gauge = visible, key_gauge
        if LOCAL:
            other_gauge = query_gauge
    else:
        gauge = query_gauge
        if LOCAL:
            other_keep, other_gauge = visible, key_gauge
    if LOCAL:
        scale = tl.load(row_scale + positions)
        inverse = tl.load(inverse_den + positions)
        shared = tl.load(u + positions)
        seen = _seen(runs, n * length + first, rows, delay, first, length, RUNS)
        d_attention = rows_product(a, rows, keep, b, rows, other_keep, e, E)
        if KEYS:
            d_attention = d_attention * inverse[None, :] + shared[None, :]
            exponent = tl.where(tl.trans(seen), key_log[:, None] - scale[None, :], -INFINITY)
        else:
            d_attention = d_attention * inverse[:, None] + shared[:, None]
            exponent = tl.where(seen, key_log[None, :] - scale[:, None], -INFINITY)
        d_attention *= tl.exp(exponent)
    read = tl.load(alpha + positions)
    read_one = tl.load(beta + positions)
    gradient = tl.zeros((C, D), tl.float32)
    row_sum = tl.zeros((C,), tl.float32)
    for block in range(0, m, F):
        f = block + tl.arange(0, F)
        again = block * zero
        phi = _phi(x + again, rows, keep, gauge, weight, shift, f, m, d, EXPONENTIAL, D)
        d_phi = rows_product(a + again, rows, keep, sums + state * m * e, f, f < m, e, E) * read[:, None]
        d_phi += read_one[:, None] * tl.load(ones + state * m + f, mask=f < m, other=0.0)[None, :]
        if LOCAL:
            other = _phi(y + again, rows, other_keep, other_gauge, weight, shift, f, m, d, EXPONENTIAL, D)
            d_phi += product(d_attention, other)
        d_log = d_phi * phi
        row_sum += tl.sum(d_log, 1)
        if not EXPONENTIAL:
            d_log = tl.where(phi > EPSILON, d_phi, 0.0)
        gradient += product(d_log, load_rows(weight, f, f < m, d, 0, D))
    if EXPONENTIAL:
        gradient -= (norm * row_sum)[:, None] * load_rows(x, rows, keep, d, 0, D)
    if KEYS:
        written = (first + rows - delay >= 0) & (first + rows - delay < length)
        put_rows(dx + (at - delay) * d, rows, written, d, gradient, D)
        tl.store(d_scale + positions, row_sum)
    else:
        put_rows(dx + at * d, rows, real, d, gradient, D)
