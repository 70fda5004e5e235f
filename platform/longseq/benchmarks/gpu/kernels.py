"""Attention by our own kernels against its definition in float64, with the same random features.

Inputs are of random sizes, and rounded to the dtype that is tested before either side sees them. All memory that a
kernel should write holds NaN before, and so do the keys and values of padding.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import favor_attention, prefill
from longseq.attention.backends import choice as backends
from longseq.attention.call import Call
from longseq.attention.carried import State, carried_attention
from longseq.attention.feature_maps import EPSILON, FeatureMap, PositiveExponential, feature_map
from longseq.benchmarks.gpu.rows import Rows, first_line

# Relative to the norm of what is exact. fp32: what favor_attention promises, on a GPU by six bf16 products. 16 bits
# round features, weights and values, and the output itself.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
# One number per head, a sum over all pairs of positions whose terms nearly cancel: in 16 bits up to 7 % was seen.
LEARNED_FACTOR = {torch.float32: 10, torch.bfloat16: 18, torch.float16: 18}
# In 16 bits gradients of queries and keys that are far apart (std 2) were up to 6.2e-3 off, of 37 keys.
FAR_FACTOR = {torch.float32: 1, torch.bfloat16: 1.3, torch.float16: 1.3}
OPRF_A = -0.05


@dataclass(frozen=True)
class Case:
    """One call of attention. ``std``: of q and k. ``tile``: in tiles of about this many tokens, with carried states."""

    name: str
    length: int
    head_dim: int = 64
    value_dim: int = 64
    features: int = 256
    kernel: str = "softmax"
    causal: bool = True
    window: int = 0
    hidden: bool = False
    documents: bool = False
    decay: bool = False
    gate: bool = False
    share: bool = False
    std: float = 1.0
    tile: int = 0

    def __str__(self) -> str:
        sizes = f"L {self.length:,}, d {self.head_dim}, e {self.value_dim}, m {self.features}, std {self.std:g}"
        return f"{self.name}: {self.kernel}, {sizes}"


def cases(large: bool, seed: int) -> Iterator[Case]:
    """All that a kernel is asked for, at sizes drawn by ``seed``: large for a GPU, small for an interpreter."""
    draw = Random(seed)

    def length(most: int) -> int:
        return draw.randint(most // 2, most) if large else draw.randint(33, 90)

    def sizes() -> dict[str, Any]:
        if not large:
            return {"head_dim": draw.choice((8, 24)), "value_dim": draw.choice((8, 20)), "features": 32}
        wide = draw.choice((32, 64, 64, 80))
        return {"head_dim": wide, "value_dim": wide, "features": draw.choice((64, 128, 256, 256))}

    both: dict[str, Any] = {"causal": False}
    plain: dict[str, Any] = {} if large else sizes()
    yield Case("scan", length(6000), **plain)
    yield Case("scan, all options", length(1500), **sizes(), hidden=True, documents=True, decay=True, std=0.5)
    yield Case("scan, decay", length(3000), **sizes(), decay=True, std=2)
    yield Case("scan, gates", length(3000), **sizes(), gate=True)
    yield Case("scan, carried states", length(1500), **sizes(), tile=length(400))
    yield Case("scan and window", length(2500), **plain, window=length(128), decay=True, share=True)
    yield Case("scan and window, carried states", length(900), **sizes(), window=20, tile=length(300), decay=True)
    yield Case("scan and window, carried states, gates", length(900), **sizes(), window=20, tile=length(300), gate=True)
    yield Case("window alone", length(2500), **{**plain, "features": 0}, window=length(200))
    options: dict[str, Any] = {"hidden": True, "documents": True, "decay": True}
    yield Case("window alone, all options", length(900), **{**sizes(), "features": 0}, window=length(150), **options)
    yield Case("window, both sides", length(900), **{**sizes(), "features": 0}, **both, window=length(90), std=2)
    yield Case("both directions", length(6000), **plain, **both, std=0.5)
    yield Case("both directions, padding", length(1500), **sizes(), **both, hidden=True, std=2)
    yield Case("both directions, all options", length(900), **sizes(), **both, window=30, share=True, **options)
    gated: dict[str, Any] = {"hidden": True, "documents": True, "gate": True}
    yield Case("both directions, gates", length(900), **sizes(), **both, window=30, share=True, **gated)
    for kernel in ("hyperbolic", "oprf", "smreg", "relu"):
        way: dict[str, Any] = {"causal": draw.random() < 0.5, "hidden": draw.random() < 0.5}
        yield Case(f"{kernel}", length(700), **sizes(), kernel=kernel, **way, std=0.5)
    if large:
        yield Case("scan, wide heads", length(2000), 128, 128, 512)
        yield Case("both directions, wide heads", length(2000), 128, 128, 256, causal=False)
        yield Case("window alone, wide heads", length(2000), 128, 128, 0, window=100)
        yield Case("a single key", 1)


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output (B, H, L, ·) in the dtype that is tested; and the options, as the door
    takes them. ``learned``: those of far_share, decay and gate that are given, fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    direction: Tensor
    padding: Tensor | None
    segments: Tensor | None
    learned: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        rng = torch.Generator().manual_seed(seed)
        batch, heads = 2 if case.length > 100 else 1, 2  # an interpreter goes through all rows

        def normal(width: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(batch, heads, case.length, width, generator=rng)).to(device, dtype)

        def uniform() -> Tensor:
            return torch.rand(batch, case.length, generator=rng).to(device)

        q, k = normal(case.head_dim, case.std), normal(case.head_dim, case.std)
        v, direction = normal(case.value_dim), normal(case.value_dim)
        padding = uniform() > 0.2 if case.hidden else None
        segments = (uniform() > 1 - 4 / case.length).cumsum(1) if case.documents else None
        if padding is not None:
            k, v = (x.masked_fill(~padding[:, None, :, None], torch.nan) for x in (k, v))
        learned = {}
        if case.decay:
            learned["decay"] = torch.tensor([0.003, 0.1], device=device)
        if case.gate:
            logits = torch.randn(batch, heads, case.length, generator=rng)
            learned["gate"] = F.logsigmoid(3 + logits).to(device)
        if case.share:
            learned["far_share"] = torch.tensor([-0.7, 0.4], device=device)
        return cls(q, k, v, direction, padding, segments, learned)


def bf16(rows: Rows, device: str, folder: Path) -> None:
    check(rows, device, torch.bfloat16)


def fp16(rows: Rows, device: str, folder: Path) -> None:
    check(rows, device, torch.float16)


def fp32(rows: Rows, device: str, folder: Path) -> None:
    check(rows, device, torch.float32)


def check(rows: Rows, device: str, dtype: torch.dtype) -> None:
    """The worst of output and gradients of every case, by every backend of our own that runs on the device."""
    for number, case in enumerate(cases(large=device == "cuda", seed=14)):
        inputs = Inputs.of(case, dtype, device, seed=number)
        expected = exact(case, inputs)
        for backend in backends_of(rows, device):
            what = f"{case}, {backend}"
            try:
                with poisoned_memory():
                    found = ours(case, inputs, backend)
            except Exception as error:  # the other cases are still worth their time
                rows.failed(what, first_line(error))
                continue
            errors = {name: _error(name, found[name], expected, dtype) for name in expected}
            worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else torch.inf)
            rows.add(what, errors[worst], most=TOLERANCE[dtype], note=f"{worst}, the worst of {', '.join(errors)}")


def later_keys(rows: Rows, device: str, folder: Path) -> None:
    """Outputs before a position, with other keys and values from there on: the positions that differ in a bit."""
    draw, large = Random(15), device == "cuda"
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for kernel, window, decay in (("softmax", 0, False), ("relu", 0, True), ("softmax", 40, True)):
            length = draw.randint(1500, 5000) if large else draw.randint(65, 140)
            position = draw.randint(1, length - 1)
            sizes: dict[str, Any] = {} if large else {"head_dim": 16, "value_dim": 16, "features": 32}
            case = Case("causal", length, **sizes, kernel=kernel, window=window, decay=decay)
            inputs = Inputs.of(case, dtype, device, seed=length)
            k, v = inputs.k.clone(), inputs.v.clone()
            k[:, :, position:] *= 100.0
            v[:, :, position:] = -7.0
            for backend in backends_of(rows, device):
                what = f"{case}, window {window}, keys from {position:,} on, {backend}, {_name(dtype)}"
                try:
                    one, other = (
                        call(case, replace(inputs, k=a, v=b), backend) for a, b in ((inputs.k, inputs.v), (k, v))
                    )
                except Exception as error:
                    rows.failed(what, first_line(error))
                    continue
                same = (one == other).flatten(0, 1).all(0).all(-1)  # (L,)
                if bool(same[position:].any()):
                    rows.failed(what, "outputs that see the other keys do not differ, so this proves nothing")
                else:
                    rows.add(what, float((~same[:position]).sum()), "positions", most=0)


def backends_of(rows: Rows, device: str) -> tuple[str, ...]:
    """Our own kernels on this device, by name; on a CPU those that are there. What is missing is a row, once."""
    return ("triton",) if device == "cuda" else _on_cpu(rows)


@functools.cache
def _on_cpu(rows: Rows) -> tuple[str, ...]:
    reasons = {name: _missing(name) for name in ("torch", "native", "triton")}
    for name, reason in reasons.items():
        if reason:
            rows.skipped(f"backend {name}", reason)
    return tuple(name for name, reason in reasons.items() if not reason)


def _missing(backend: str) -> str:
    """Why a backend cannot compute on this machine's CPU; empty if it can."""
    try:
        backends.choose(backend, feature_map("softmax", 8, 8), (torch.zeros(1, 1, 8),) * 3)
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh memory holds NaN: a result that was never written shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic version, and of the interpreter
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def call(case: Case, inputs: Inputs, backend: str, **learned: Tensor) -> Tensor:
    """The case's attention through the door that everybody takes."""
    options: dict[str, Any] = {**inputs.learned, **learned, "features": case.features, "kernel": case.kernel}
    options |= {"window": case.window, "oprf_a": _oprf_a(case), "backend": backend}
    if not case.tile:
        return favor_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            causal=case.causal,
            key_padding=inputs.padding,
            segments=inputs.segments,
            **options,
        )
    state: State = ()
    outs = []
    gates = options.pop("gate", None)
    for q, k, v, gate in zip(
        *(x.split(case.tile, dim=2) for x in (inputs.q, inputs.k, inputs.v)),
        itertools.repeat(None) if gates is None else gates.split(case.tile, dim=2),
        strict=gates is not None,
    ):
        out, state = carried_attention(q, k, v, state, Call.of(**options, gate=gate))
        outs.append(out)
    return torch.cat(outs, dim=2)


def ours(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Output and gradients of a case by a backend."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    learned = {name: x.clone().requires_grad_() for name, x in inputs.learned.items()}
    out = call(case, replace(inputs, q=q, k=k, v=v), backend, **learned)
    given = {"q": q, "k": k, "v": v, **learned}
    grads = torch.autograd.grad(out, list(given.values()), inputs.direction, materialize_grads=True)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(given, grads, strict=True)}}


def exact(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same in float64 from the definition, a sequence and head at a time: every query's weight of every key."""
    phi, real = _map(case, inputs.q), inputs.padding
    given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.learned}
    if real is not None:
        given |= {name: given[name].where(real[:, None, :, None], 0.0) for name in "kv"}
    leaves = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    out = torch.empty_like(leaves["v"])
    for at in itertools.product(range(out.shape[0]), range(out.shape[1])):
        visible = _visible(case, inputs, at[0])
        row = _log_weights(case, phi, leaves, at).masked_fill(~visible, -torch.inf)
        row = row.masked_fill(~visible.any(-1, keepdim=True), 0.0).softmax(-1) * visible  # a blind query gets zeros
        seen = row @ leaves["v"][at]
        seen.backward(inputs.direction[at].double())
        out.data[at] = seen.detach()
    zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
    return {
        "out": out.detach(),
        **{f"d{name}": zeros[name] if x.grad is None else x.grad for name, x in leaves.items()},
    }


def _visible(case: Case, inputs: Inputs, sequence: int) -> Tensor:
    """(L, L) bool."""
    visible = torch.ones(case.length, case.length, dtype=torch.bool, device=inputs.q.device)
    if case.causal:
        visible = visible.tril()
    if inputs.padding is not None:
        visible = visible & inputs.padding[sequence]
    if inputs.segments is not None:
        visible = visible & (inputs.segments[sequence][:, None] == inputs.segments[sequence])
    if not case.features:
        visible = visible & (_distance(case, inputs.q.device) < case.window)
    return visible


def _log_weights(case: Case, phi: Any, leaves: dict[str, Tensor], at: tuple[int, int]) -> Tensor:
    """(L, L): exact logits inside the window, the logarithm of φ(q)ᵀφ(k) beyond."""
    q, k, head = leaves["q"][at], leaves["k"][at], at[1]
    distance = _distance(case, q.device)
    near = q @ k.T * case.head_dim**-0.5
    weights = near
    if phi is not None:
        (a, a_scale), (b, b_scale) = _features(phi, q), _features(phi, k)
        weights = (a @ b.T).log() + a_scale + b_scale.T
        if "far_share" in leaves:
            weights = weights + leaves["far_share"][head]
        weights = torch.where(distance < case.window, near, weights)
    if "gate" in leaves:
        sums = leaves["gate"][at].cumsum(0)
        weights = weights - (sums[:, None] - sums).abs()
    return weights - leaves["decay"][head] * distance if "decay" in leaves else weights


def _distance(case: Case, device: torch.device) -> Tensor:
    places = torch.arange(case.length, device=device)
    return (places[:, None] - places).abs()


def _features(phi: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """φ(x) = features · exp(scale), (L, m) and (L, 1): see :func:`longseq.attention.feature_maps.feature_map`."""
    u = x @ phi.weight.double().T
    if not isinstance(phi, PositiveExponential):  # relu
        return torch.relu(u) + EPSILON, torch.full_like(u[:, :1], phi.log_constant)
    log_phi = u - x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5) + phi.log_constant
    if phi.shift is not None:
        log_phi = log_phi + phi.shift.double()
    top = log_phi.detach().amax(-1, keepdim=True)
    return (log_phi - top).exp(), top


def _map(case: Case, like: Tensor) -> FeatureMap | None:
    """The features that attention takes for inputs of this dtype: those that decoding would go on with."""
    if not case.features:
        return None
    nothing = like.new_zeros(1, 1, 0, case.head_dim)
    asked: dict[str, Any] = {"kernel": case.kernel, "features": case.features, "oprf_a": _oprf_a(case)}
    far = prefill(nothing, nothing, nothing, backend="torch", **asked)[1].far
    assert far is not None
    return far.feature_map


def _oprf_a(case: Case) -> float:
    return OPRF_A if case.kernel == "oprf" else 0.0


def _error(name: str, found: Tensor, expected: dict[str, Tensor], dtype: torch.dtype) -> float:
    """Of the norm of what is exact, over the factor by which ``name`` may be further off than others.

    Where hardly a key is seen, gradients of q and k vanish, but their terms do not.
    """
    exact = expected[name]
    scale, factor = exact.norm(), 1.0
    if name in ("dq", "dk"):
        scale, factor = torch.maximum(scale, 0.1 * expected["dv"].norm()), FAR_FACTOR[dtype]
    if name in ("ddecay", "dfar_share"):
        factor = LEARNED_FACTOR[dtype]
    return float((found.double() - exact).norm() / scale.clamp_min(1e-30)) / factor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
