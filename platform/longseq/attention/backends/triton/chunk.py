"""What the Triton kernels of a scan share: a chunk's exponents and features, who sees whom, and states.

The sequence is cut into segments of whole chunks of C rows. Features φ exist for one block of F features at a time, in
registers. Operands of products are bf16 where the inputs are bf16 or fp16, else fp32, see :mod:`.rows`; sums, exponents
and log-scales are fp32.

Names: C rows of a chunk, F features of a block, D and E the widths d and e padded to powers of two. Rows of queries
are counted by position i, keys by the position t = j + delay at which they become visible: query i sees t ≤ i.
``decay`` is a rate a row, (N,), or with GATE the sums of log-gates before each position and behind the last, float64
(N, L + 1).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import triton
import triton.language as tl

from longseq.attention.backends.triton.rows import INTERPRETED, product, rounded, sliced_product

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
FLOOR = tl.constexpr(-40.0 * math.log2(math.e))  # as in feature_maps: e^-40 of a row's largest feature is the least
EPSILON = tl.constexpr(1e-3)  # as in feature_maps: relu(u) + ε
NOTHING = tl.constexpr(-1e30)  # as in state: the log-scale of an empty state
LEAST = tl.constexpr(1.1754943508222875e-38**0.75)  # as in state.inverse: a denominator below has seen no key
INFINITY = tl.constexpr(math.inf)
# Arguments that follow from the length of the sequence: a new length is no reason to compile again.
ANY_LENGTH = ("length", "offset", "delay", "steps", "segments", "chunks")


@triton.jit
def operand(x, HALF: tl.constexpr):
    """x as products with features take it."""
    return rounded(x, tl.bfloat16 if HALF else tl.float32)


@triton.jit
def again(x, block, length, HALF: tl.constexpr):
    """x for the products of one more block of features: split into its parts there, and not for the whole loop."""
    if not HALF:
        x += (block * (length >> 31)).to(tl.float32)  # 0, which a compiler cannot know
    return x


@triton.jit
def late(first, varies, length, C: tl.constexpr):
    """``first`` once more, for what is found and loaded again behind the loop over features; it ``varies`` by chunk.

    A compiler that knew it for the same would hold all addresses and masks in registers through that loop.
    """
    return first + C * varies * (length >> 31)


@triton.jit
def load_tile(base, rows, keep, width: tl.constexpr, WIDTH: tl.constexpr):
    """Whole rows of a matrix; zeros where not to keep, and not even read there."""
    columns = tl.arange(0, WIDTH)
    at = base + rows[:, None] * width + columns[None, :]
    if width == WIDTH:
        tile = tl.load(at, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=keep[:, None] & (columns < width)[None, :], other=0.0)
    return tile


@triton.jit
def exponents(
    x, base, rows, keep, weight, shift, block, length, m: tl.constexpr, d: tl.constexpr,
    SHIFTED: tl.constexpr, HALF: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """u = ωᵀx + shift of rows x (C, D) and a block of features: (C, F). x lies at ``base``, and fp32 is read there."""
    f = block + tl.arange(0, F)
    if HALF:
        w = load_tile(weight, f, f < m, d, D)
        if INTERPRETED:
            w = w.to(tl.float32)
        u = product(x, tl.trans(w))
    else:
        u = sliced_product(base + block * (length >> 31), rows, keep, weight, f, f < m, d, D)
    if SHIFTED:
        u += tl.load(shift + f, mask=f < m, other=0.0)[None, :]
    return u


@triton.jit
def largest(
    x, base, rows, keep, weight, shift, length, m: tl.constexpr, d: tl.constexpr,
    SHIFTED: tl.constexpr, HALF: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The largest u of each row of x, (C,)."""
    best = tl.full((x.shape[0], F), -INFINITY, tl.float32)
    for block in tl.range(0, m, F, disable_licm=True):
        f = block + tl.arange(0, F)
        u = exponents(x, base, rows, keep, weight, shift, block, length, m, d, SHIFTED, HALF, F, D)
        if m % F != 0:
            u = tl.where((f < m)[None, :], u, -INFINITY)
        best = tl.maximum(best, u)
    return tl.max(best, 1)


@triton.jit
def features(u, gauge, f, m: tl.constexpr, EXPONENTIAL: tl.constexpr, F: tl.constexpr):
    """φ of u = ωᵀx + shift; ``gauge`` is log2(e) times the largest of each row. A NaN stays one."""
    if EXPONENTIAL:
        # Comparisons, unlike maxima, let a NaN through, and so does this maximum.
        phi = tl.exp2(tl.maximum(u * LOG2E - gauge[:, None], FLOOR, propagate_nan=tl.PropagateNan.ALL))
    else:
        phi = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL) + EPSILON
    if m % F != 0:
        phi = tl.where((f < m)[None, :], phi, 0.0)
    return phi


@triton.jit
def load_inputs(base, rows, keep, width: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of q or k as :func:`exponents` takes them."""
    x = load_tile(base, rows, keep, width, WIDTH)
    if INTERPRETED or not HALF:
        x = x.to(tl.float32)
    return x


@triton.jit
def run_at(runs, t, delay, length):
    """The document of the key at position t; that of a missing one is the first."""
    j = t - delay
    return tl.load(runs + j, mask=(j >= 0) & (t < length), other=0)


@triton.jit
def seen_by(runs, first, rows, delay, length, RUNS: tl.constexpr):
    """Which query of a chunk sees which of its keys: (queries, keys)."""
    seen = rows[:, None] >= rows[None, :]
    if RUNS:
        own = tl.load(runs + first + rows, mask=rows < length - first, other=-2)
        seen = seen & (own[:, None] == run_at(runs, first + rows, delay, length)[None, :])
    return seen


@triton.jit
def state_reads(runs, first, rows, delay, length, RUNS: tl.constexpr):
    """Which query of a chunk reads the state before it; beyond the length too, or M would be too small for it."""
    reads = rows >= 0
    if RUNS:
        own = tl.load(runs + first + rows, mask=rows < length - first, other=-2)
        reads = own == run_at(runs, first - 1, delay, length)
    return reads


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _maximum_of_run(a_run, a, b_run, b):
    return b_run, tl.where(a_run == b_run, tl.maximum(a, b), b)


@triton.jit
def row_scales(b, c, runs, first, rows, delay, length, RUNS: tl.constexpr):
    """M of each query of a chunk: the largest log-scale of the keys it sees and of the state, c (C,)."""
    if RUNS:
        # A query sees the last of the keys up to it, and as many before as are of the same document; or none.
        run = run_at(runs, first + rows, delay, length)
        own = tl.load(runs + first + rows, mask=rows < length - first, other=-2)
        _, so_far = tl.associative_scan((run, b), 0, _maximum_of_run)
        so_far = tl.where(own == run, so_far, -INFINITY)
    else:
        so_far = tl.associative_scan(b, 0, _maximum)
    return tl.maximum(so_far, c)


@triton.jit
def through(b, c, runs, first, rows, delay, length, RUNS: tl.constexpr, WHOLE: tl.constexpr):
    """The log-scale c' after a chunk with key scales b, e^{b − c'} and e^{c − c'}.

    WHOLE: b are whole multiples of log 2, and so is c'. Then e^{b − c'} is a power of 2, which rounds no value.
    """
    goes_on = c == c
    if RUNS:
        ending = run_at(runs, tl.minimum(first + rows.shape[0], length) - 1, delay, length)
        goes_on = ending == run_at(runs, first - 1, delay, length)
        b = tl.where(run_at(runs, first + rows, delay, length) == ending, b, -INFINITY)
    after = tl.maximum(tl.where(goes_on, c, NOTHING), tl.max(b, 0))
    if WHOLE:
        after = tl.ceil(after * LOG2E) * LN2
    return after, tl.exp(b - after), tl.where(goes_on, tl.exp(c - after), 0.0)


@triton.jit
def key_logs(key_scale, first, rows, delay, length):
    """b of the keys that become visible in a chunk, −inf where none does."""
    j = first + rows - delay
    return tl.load(key_scale + j, mask=(j >= 0) & (first + rows < length), other=-INFINITY)


@triton.jit
def load_state(sums, f, m: tl.constexpr, e: tl.constexpr, F: tl.constexpr, E: tl.constexpr):
    """Columns f of Sᵀ, (E, F), and of the normaliser, (F,)."""
    rows = tl.arange(0, E)
    at = sums + rows[:, None] * m + f[None, :]
    if e == E and m % F == 0:
        state = tl.load(at)
        one = tl.load(sums + e * m + f)
    else:
        state = tl.load(at, mask=(rows < e)[:, None] & (f < m)[None, :], other=0.0)
        one = tl.load(sums + e * m + f, mask=f < m, other=0.0)
    return state, one


@triton.jit
def put_state(sums, f, state, m: tl.constexpr, e: tl.constexpr, F: tl.constexpr, E: tl.constexpr):
    rows = tl.arange(0, E)
    at = sums + rows[:, None] * m + f[None, :]
    if e == E and m % F == 0:
        tl.store(at, state)
    else:
        tl.store(at, state, mask=(rows < e)[:, None] & (f < m)[None, :])


@triton.jit
def put_normaliser(sums, f, one, m: tl.constexpr, e: tl.constexpr, F: tl.constexpr):
    """By itself: where it comes first, its many copies are out of the registers when the state is multiplied."""
    at = sums + e * m + f
    if m % F == 0:
        tl.store(at, one)
    else:
        tl.store(at, one, mask=f < m)


@triton.jit
def forgotten(gate, first, at, delay, length):
    """What a gate takes from a log-weight between the first key of the chunk at ``first`` and before position ``at``.

    Differences are taken of float64, and counted from each chunk's start: fp32 has them exactly enough.
    """
    begin = tl.load(gate + tl.minimum(tl.maximum(first - delay, 0), length))
    return (begin - tl.load(gate + tl.minimum(tl.maximum(at, 0), length))).to(tl.float32)


@triton.jit
def segment_held(
    begin, runs, decay, s, delay, length, steps, chunks, rate, RUNS: tl.constexpr, GATE: tl.constexpr, C: tl.constexpr
):
    """c of the state before a segment as seen from behind it, and whether that state's document goes on till there."""
    first = s * steps * C
    stop = tl.minimum((s + 1) * steps, chunks)
    goes_on = begin == begin
    if RUNS:
        ending = run_at(runs, tl.minimum(stop * C, length) - 1, delay, length)
        goes_on = ending == run_at(runs, first - 1, delay, length)
    if GATE:
        return begin - forgotten(decay, first, stop * C - delay, delay, length), goes_on
    return begin - rate * (C * (stop - s * steps)).to(tl.float32), goes_on


@triton.jit
def transposed(index, m: tl.constexpr, e: tl.constexpr):
    """Where the element of (e + 1, m) at ``index`` lies in (m, e + 1), the layout of an AttentionState."""
    return index % m * (e + 1) + index // m


@triton.jit
def scaled_gradients(
    grad, scale, out, dlse, rows, real, e: tl.constexpr, DLSE: tl.constexpr, HALF: tl.constexpr, E: tl.constexpr
):
    """g of a chunk's queries, times ``scale`` · their denominator: its values' part (C, E) as operands, its last (C,).

    The last is of the rounded others, and all kernels take the same: most of Σ_j (g_iᵀv_j + g_i[e]) A_ij may cancel.
    """
    reading = operand(grad.to(tl.float32) * scale[:, None], HALF)
    last = -tl.sum(reading.to(tl.float32) * load_tile(out, rows, real, e, E), 1)
    if DLSE:
        last += tl.load(dlse + rows, mask=real, other=0.0) * scale
    return reading, last


@triton.jit
def visible_weights(b, scale, runs, first, rows, delay, length, RUNS: tl.constexpr):
    """exp(b_j − M_i), 0 where i does not see j: (keys, queries)."""
    seen = tl.trans(seen_by(runs, first, rows, delay, length, RUNS))
    return tl.where(seen, tl.exp2(b[:, None] * LOG2E - scale[None, :] * LOG2E), 0.0)
