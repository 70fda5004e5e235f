"""Floating-point operations that an attention needs: matrix products only, counted for one token and one head.

d = head_dim, e = value_dim, m = features, C = the scan's chunk. A product of (a, b) by (b, c) is 2abc; causal squares
are counted half, since half of each is needed. Exponentials, norms, rescaling, masks and the states that our backward
pass builds again are left out: a rate from these numbers is that of useful work, lower than what the hardware did.

FAVOR+ forward      features of q and k  4md      state read and updated  4m(e+1)      causal: C/2 · 2(m+e+1)
FAVOR+ backward     features again*      4md      their gradient          4md          four state products  8m(e+1)
                    causal: C/2 · (2m* [A again] + 2(e+1) [dA] + 4m [dA φ(k), dAᵀ φ(q)] + 2(e+1) [Aᵀ g])
exact forward       2n(d+e), n the mean number of visible keys: L, or L/2 causal
exact backward      2.5 times the forward*
sderf, aderf, learned_covariance: queries and keys turned, 4d² each way; the learned matrix's gradient 4d² more
window w            exact over its keys, and the causal scan over the rest, once each way

* holds a recomputation that spares memory. The second count, "strict", leaves these out (exact: 2 times): only what
the derivative itself needs. A contender that keeps all features does no more than that.
Linear attention of others is counted as FAVOR+ without the squares, which belong to our chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from longseq.attention.options import FRAMED_KERNELS, AttentionOptions


@dataclass(frozen=True)
class Flops:
    """``needed``: with the recomputation of the backward pass; ``strict``: without."""

    needed: float
    strict: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.needed + other.needed, self.strict + other.strict)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.needed * factor, self.strict * factor)


@dataclass(frozen=True)
class Count:
    """One token and head."""

    forward: Flops
    backward: Flops

    @property
    def both(self) -> Flops:
        return self.forward + self.backward

    def __add__(self, other: Count) -> Count:
        return Count(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Count:
        return Count(self.forward * factor, self.backward * factor)


NOTHING = Count(Flops(0.0, 0.0), Flops(0.0, 0.0))


def favor(d: int, e: int, m: int, chunk: int = 0) -> Count:
    """FAVOR+; ``chunk`` is that of a causal scan, 0 where there are no squares."""
    half = chunk / 2
    forward = 4 * m * d + 4 * m * (e + 1) + half * 2 * (m + e + 1)
    again = 4 * m * d + half * 2 * m
    backward = 4 * m * d + 8 * m * (e + 1) + half * (4 * m + 4 * (e + 1))
    return Count(Flops(forward, forward), Flops(backward + again, backward))


def exact(d: int, e: int, keys: float) -> Count:
    """Exact attention of a query over ``keys`` keys on average."""
    forward = 2 * keys * (d + e)
    return Count(Flops(forward, forward), Flops(2.5 * forward, 2 * forward))


def windowed(d: int, e: int, m: int, *, length: int, window: int, causal: bool, chunk: int) -> Count:
    """Exact over the keys less than ``window`` positions away, FAVOR+ over the others."""
    window = min(window, length)
    near = window - window * (window - 1) / (2 * length)  # the mean of min(i + 1, window)
    far = favor(d, e, m, chunk) * ((length - window) / length) if m else NOTHING
    return exact(d, e, near) + far if causal else exact(d, e, 2 * near - 1) + far * 2


def attention(options: AttentionOptions, d: int, length: int, *, causal: bool, chunk: int) -> Count:
    """What these options ask for, at equal widths d of queries and values."""
    framed = options.kind == "favor" and options.kernel in FRAMED_KERNELS
    turns = (framed + options.learned_covariance) * 4.0 * d * d  # of q and of k
    first = Count(Flops(turns, turns), Flops(turns, turns) * (1 + options.learned_covariance))
    if options.kind == "exact":
        return exact(d, d, length / 2 if causal else length) + first
    if options.window:
        found = windowed(d, d, options.features, length=length, window=options.window, causal=causal, chunk=chunk)
        return found + first
    return favor(d, d, options.features, chunk if causal else 0) + first
