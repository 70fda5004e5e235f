"""FAVOR+ attention in plain PyTorch (Choromanski et al. 2020, arXiv 2009.14794): feature maps and sums over keys.

A query weighs a key by φ(q)ᵀφ(k), an estimate of exp(qᵀk/√D), so that sums over keys are formed once and not for each
query. A row of features is kept as bounded numbers and a log-scale, φ(x) = features · exp(log_scale). The random
projections are a function of (seed, layer, draw), and are part of no file.

Parts over disjoint keys give their result and the log of their denominator, by which they are put together. The largest
exponent that is taken out of sums is a constant to autograd: it cancels.

Axes: B batch, L length, H heads, D head_dim, m features. Masks: True where a position is real.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 128  # queries whose weights exist at a time
EPSILON = 1e-3  # of the kernels f(u) + ε
NOTHING = -1e30  # the log-scale of no key at all: finite, so that differences are 0 and not NaN
FRAMED = ("sderf", "aderf")
SIGNED = ("trigonometric", "gelu", "cos", "tanh", "identity")  # kernels whose denominators may vanish
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu_direct": F.relu, "sigmoid": torch.sigmoid, "abs": torch.abs, "gelu": F.gelu, "cos": torch.cos,
    "tanh": torch.tanh, "identity": lambda u: u, "elu": lambda u: F.elu(u) + 1,
}  # fmt: skip


class Gate(nn.Module):
    """log f (B, H, L) = logsigmoid(w·x + b) of x (B, L, E): a forget gate of each head (arXiv 2503.02130).

    No ``nn.Linear``, so that adapters and quantisers leave it alone. It begins as a decay of these rates.
    """

    def __init__(self, dim: int, rates: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(len(rates), dim)), nn.Parameter(-rates.expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(F.linear(x.to(self.weight.dtype), self.weight).float() + self.bias.float()).mT


class Frame(nn.Module):
    """Coordinates in which the features of sderf and aderf (arXiv 2302.00787) vary least, q → R q and k → R^-T (k − c),
    found by longseq; and a learned covariance of the projections (arXiv 2603.04127). ``constants``: R, R^-T, c and A's
    diagonal of each head, the bits of float64 numbers; 0 if they are not found yet."""

    constants: Tensor

    def __init__(self, heads: int, d: int, kernel: str, learned: bool):
        super().__init__()
        self.framed = kernel in FRAMED
        self.covariance = nn.Parameter(torch.zeros(heads, d, d)) if learned else None
        if self.framed:
            self.register_buffer("constants", torch.zeros(heads, 2 * d + 2, d, dtype=torch.int64))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        d, wide = q.shape[-1], torch.promote_types(q.dtype, torch.float32)
        if self.covariance is not None:
            metric = torch.eye(d, device=q.device) + self.covariance.to(wide)
            q, k = ((t.to(wide) @ metric.mT).to(t.dtype) for t in (q, k))
        if self.framed and self.constants.any():
            to_q, to_k, centre, _ = self.constants.view(torch.float64).to(wide).split((d, d, 1, 1), dim=1)
            q, k = ((t.to(wide) @ by.mT).to(t.dtype) for t, by in ((q, to_q), (k.to(wide) - centre, to_k)))
        return q, k

    @property
    def a(self) -> Tensor:
        """A's diagonal, 0 of other kernels."""
        return self.constants[0, -1].cpu().view(torch.float64) if self.framed else torch.zeros((), dtype=torch.float64)


class FeatureMap:
    """φ(x) = features · exp(log_scale) of rows x (..., D), whose product estimates exp(qᵀk/√D) for the first kernels.

    With u = ωᵀx·D^-1/4 it is exp(u − ‖x‖²/(2√D)) for softmax, smreg (rows of length √D), hyperbolic (of u and −u) and
    oprf (arXiv 2205.15317), sderf, aderf; [cos u, sin u] · exp(+‖x‖²/(2√D)) for trigonometric; f(u) + ε for all others.

    Args:
        rows: ω of :func:`projections`; None for relu_direct.
        features: m.
        like: a query: its device, and the dtype whose precision the rows have.
        a: oprf's constant A ≤ 0, float64; of sderf and aderf one a coordinate.
    """

    def __init__(self, kernel: str, rows: Tensor | None, features: int, like: Tensor, a: Tensor):
        self.kernel, d = kernel, like.shape[-1]
        wide = torch.promote_types(like.dtype, torch.float32)
        half = like.dtype in (torch.float16, torch.bfloat16)
        exact = torch.float64 if half else wide  # rounded once, not twice
        omega = torch.eye(d, dtype=exact, device="cpu") if rows is None else rows.to(exact)
        stretch = 1 - 4 * a
        weight = omega * d**-0.25 * stretch.sqrt().to(exact)
        weight = (weight.to(like.dtype) if half else weight).to(like.device, wide)
        pair = {"hyperbolic": -weight, "trigonometric": weight}.get(kernel)
        self.weight = weight if pair is None else torch.cat((weight, pair))
        self.shift = (omega.square() * a).sum(-1).to(like.device, wide) if a.any() else 0.0
        count = 1 if rows is None else features / 2 if kernel == "trigonometric" else features
        self.log_constant = float(stretch.expand(d).log().sum()) / 4 - 0.5 * math.log(count)

    @property
    def positive(self) -> bool:
        return self.kernel not in SIGNED

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (..., m) and log-scale (..., 1)."""
        u = x @ self.weight.T + self.shift
        half = x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        if self.kernel == "trigonometric":
            cos, sin = u.chunk(2, dim=-1)
            return torch.cat((cos.cos(), sin.sin()), dim=-1), half + self.log_constant
        if self.kernel in FUNCTIONS:
            return FUNCTIONS[self.kernel](u) + EPSILON, torch.full_like(half, self.log_constant)
        top = u.amax(-1, keepdim=True).detach()  # cancels
        powers = (u - top).clamp(min=-40.0).exp()
        if self.kernel == "exp":
            over = top - math.log(EPSILON)
            features = powers * over.sigmoid() + (-over).sigmoid()
            return features, F.softplus(over) + math.log(EPSILON) + self.log_constant
        return powers, top - half + self.log_constant


@functools.lru_cache(maxsize=512)
def projections(rows: int, d: int, seed: int, layer: int, draw: int, orthogonal: bool, of_one_length: bool) -> Tensor:
    """ω (rows, d) float64: rows N(0, I), in blocks of d orthogonal ones; or of length √d."""
    digest = hashlib.blake2b(repr(("projection", seed, layer, draw)).encode(), digest_size=8).digest()
    rng = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float64)

    if orthogonal:
        blocks = [normal(d, d) for _ in range(-(-rows // d))]
        lengths = normal(rows, d).norm(dim=1, keepdim=True)
        q = torch.stack(blocks).numpy()
        for _ in range(2):  # Gram-Schmidt, the second time for the rounding of the first
            for at in range(d):
                column, later = q[:, :, at : at + 1], q[:, :, at + 1 :]
                column /= np.sqrt((column * column).sum(1, keepdims=True))
                later -= column * (column * later).sum(1, keepdims=True)
        omega = torch.from_numpy(q).flatten(0, 1)[:rows] * lengths
    else:
        omega = normal(rows, d)
    return omega * (d**0.5 / omega.norm(dim=1, keepdim=True)) if of_one_length else omega


def scan(
    phi: FeatureMap, q: Tensor, k: Tensor, v: Tensor, there: Tensor, of_queries: Tensor, of_keys: Tensor,
    before: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention by features of query i to keys 0…i.

    Args:
        q, k, v: (B, H, L, D) in fp32.
        there: (B, L), True where a key is real.
        of_queries, of_keys: G (B, H, L) float64: every weight is multiplied by exp(G of the query − G of the key).
        before: Σ φ(k) [v, 1]ᵀ over earlier keys, and its log-scale as seen from G = 0.

    Returns:
        The result (B, H, L, D), the log of its denominator (B, H, L, 1), and ``before`` of the next positions.
    """
    values, outs = _with_ones(v), []
    if before:
        sums, scale = before
    else:
        sums = v.new_zeros(*v.shape[:2], len(phi.weight), v.shape[-1] + 1)
        scale = v.new_full((*v.shape[:2], 1, 1), NOTHING)
    seen_from = torch.zeros_like(of_keys[..., :1, None])
    for start in range(0, q.shape[2], CHUNK):
        at = slice(start, start + CHUNK)
        (fq, q_scale), (fk, k_scale), value = phi(q[:, :, at]), phi(k[:, :, at]), values[:, :, at]
        t = torch.arange(fq.shape[2], device=q.device)[:, None]
        anchor = of_keys[..., start : start + 1, None]  # differences from it, so that fp32 is enough
        scale, seen_from = scale + (anchor - seen_from).to(v.dtype), anchor
        forgotten = (anchor - of_keys[:, :, at, None]).to(v.dtype)
        weight = k_scale.masked_fill(~there[:, None, at, None], -torch.inf) + forgotten
        top = torch.maximum(weight.cummax(2).values, scale).detach()  # depends on no later key
        inside = (weight.mT - top).masked_fill(t < t.T, -torch.inf).exp()
        total = (fq @ fk.mT * inside) @ value + fq @ sums * torch.exp(scale - top)
        out, log_den = _divided(total, phi.positive)
        of_query = (of_queries[:, :, at, None] - anchor).to(v.dtype)
        outs.append((out, torch.where(log_den == NOTHING, NOTHING, log_den + top + q_scale + of_query)))
        last = top[:, :, -1:]
        sums = sums * torch.exp(scale - last) + fk.mT @ (value * torch.exp(weight - last))
        scale = last
    scale = scale + (of_queries[..., -1:, None] - seen_from).to(v.dtype)
    out, lse = (torch.cat(x, dim=2) for x in zip(*outs, strict=True))
    return out, lse, sums, scale


def bidirectional(phi: FeatureMap, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Attention by features of every query to every key: one pass over the keys, one over the queries."""
    fk, scale = phi(k)
    if real is not None:
        scale = scale.masked_fill(~real[:, None, :, None], -torch.inf)
    top = scale.amax(2, keepdim=True).clamp(min=NOTHING).detach()
    return _divided(phi(q)[0] @ (fk.mT @ (_with_ones(v) * torch.exp(scale - top))), phi.positive)[0]


def near(
    q: Tensor, k: Tensor, v: Tensor, there: Tensor, window: int, causal: bool, forgotten: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention to keys less than ``window`` positions away; the result and the log of its denominator.

    k, v, there and G of them, ``forgotten`` (B, H, window + L), have ``window`` positions before the first query's.
    """
    outs = []
    for start in range(0, q.shape[2], CHUNK):
        stop = min(start + CHUNK, q.shape[2])
        at = slice(start, stop + window + (0 if causal else window))
        ahead = distance(q[:, :, start:stop], k[:, :, at], window)
        seen = (ahead < window) & (ahead > (-1 if causal else -window)) & there[:, None, None, at]
        scores = q[:, :, start:stop] @ k[:, :, at].mT * q.shape[-1] ** -0.5
        if forgotten is not None:
            here = forgotten[:, :, start + window : stop + window]
            scores = scores - between(here, forgotten[:, :, at]).to(q.dtype)
        scores = scores.masked_fill(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp(min=NOTHING).detach()
        out, log_den = _divided((scores - top).exp() @ _with_ones(v[:, :, at]), True)
        outs.append((out, (log_den + top).clamp(min=NOTHING)))
    out, lse = (torch.cat(x, dim=2) for x in zip(*outs, strict=True))
    return out, lse


def together(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One numerator and one denominator over the keys of all parts."""
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return torch.stack([out * torch.exp(lse - total) for out, lse in parts]).sum(0)


def _divided(total: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """[Σ w v, Σ w] to their quotient and log |Σ w|; zeros and NOTHING where the sum is none, or cancels to rounding."""
    den = total[..., -1:]
    blind = den.abs() < (torch.finfo(den.dtype).tiny ** 0.75 if positive else 1e-6)
    safe = den.masked_fill(blind, 1.0)
    return (total[..., :-1] / safe).masked_fill(blind, 0.0), safe.abs().log().masked_fill(blind, NOTHING)


def distance(q: Tensor, k: Tensor, before: int | None = None) -> Tensor:
    """How far each key lies before each query, (L, L of keys); ``before`` keys precede the first query, or both end
    together."""
    before = k.shape[2] - q.shape[2] if before is None else before
    queries = torch.arange(q.shape[2], device=q.device) + before
    return queries[:, None] - torch.arange(k.shape[2], device=q.device)


def between(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """|G − G| of queries and keys, (B, H, L, L of keys): how much of a key's weight is forgotten on the way."""
    return (of_queries[..., None] - of_keys[:, :, None]).abs()


def behind(
    k: Tensor, v: Tensor, real: Tensor | None, forgotten: Tensor, past: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """Keys and values behind those that were kept, zeros where they are hidden; which are real, (B, ·); and their G,
    which is 0 where the new positions begin."""
    if real is None:
        real = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device)
    else:
        k, v = (t.masked_fill(~real[:, None, :, None], 0.0) for t in (k, v))
    if past is None:
        return k, v, real, forgotten
    k, v, forgotten = (torch.cat(both, dim=2) for both in zip((*past[:2], past[3]), (k, v, forgotten), strict=True))
    return k, v, torch.cat((past[2], real), dim=1), forgotten


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves split, in fp32."""
    (cos, sin), (a, b) = table, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat((v, v.new_ones(*v.shape[:-1], 1)), dim=-1)
