"""One attention call: ours, the exact one and other libraries' on the same q, k and v."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import AttentionOptions, favor_attention, projection_matrix
from longseq.attention.scan import CHUNK
from longseq.benchmarks.ladder import Progress, Task, climb
from longseq.benchmarks.request import ATTENTION_CONTENDERS, CAUSAL, AttentionRequest
from longseq.benchmarks.results import Note, Results
from longseq.measure import flops

FORWARD, TRAINING = "forward", "forward + backward"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, L, D) each


class Absent(Exception):
    """A contender that cannot take part, and why."""


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output: (B, H, L, D). q, k and v require a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor


def measure(request: AttentionRequest, results: Results, progress: Progress) -> None:
    """Fill ``results``."""

    def contenders(direction: str) -> dict[str, Callable[[Inputs], Mapping[str, Task]]]:
        causal, found = direction == CAUSAL, dict[str, Callable[[Inputs], Mapping[str, Task]]]()
        for name in request.contenders:
            attention = _build(name, request, causal)
            if isinstance(attention, Absent):
                results.notes.append(Note(name, str(attention), direction))
            else:
                found[name] = partial(_tasks, request, causal, name, attention)
        return found

    climb(request, partial(make_inputs, request), contenders, results, progress)


def empty_results(request: AttentionRequest) -> Results:
    """Where the measurements go."""
    about = {name: ATTENTION_CONTENDERS[name] for name in request.contenders}
    return Results("attention", (request.batch * request.heads, "token and head"), about, flops.__doc__)


def make_inputs(request: AttentionRequest, length: int) -> Inputs:
    """Normal numbers, q and k of standard deviation 0.5: the time does not depend on them, and no library overflows."""
    rng = torch.Generator(device=request.device).manual_seed(length)
    shape = (request.batch, request.heads, length, request.head_dim)
    dtype = getattr(torch, request.dtype)
    q, k, v, grad = (torch.randn(shape, generator=rng, device=request.device, dtype=dtype) for _ in range(4))
    q, k = q.mul_(0.5), k.mul_(0.5)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)


def count(request: AttentionRequest, name: str, causal: bool, length: int) -> flops.Count:
    """FLOPs of a contender at a length."""
    if name == "opt":
        return flops.NOTHING
    window, kind = request.window if name == "window" else 0, "exact" if name == "exact" else "favor"
    options = AttentionOptions(kind=kind, kernel=request.kernel, features=request.features, window=window)
    chunk = CHUNK if name in ("favor", "window") else 0  # others' have no squares
    one = flops.attention(options, request.head_dim, length, causal=causal, chunk=chunk)
    return one * (request.batch * request.heads * length)


def _build(name: str, request: AttentionRequest, causal: bool) -> Attention | Absent:
    try:
        return _BUILDERS[name](request, causal)
    except Absent as absent:
        return absent


def _tasks(
    request: AttentionRequest, causal: bool, name: str, attention: Attention, inputs: Inputs
) -> Mapping[str, Task]:
    q, k, v, grad = inputs.q, inputs.k, inputs.v, inputs.grad
    constants = q.detach(), k.detach(), v.detach()  # as in inference: nothing is to be kept for a derivative

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attention(*constants),)

    def training() -> tuple[Tensor, ...]:
        out = attention(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), grad, allow_unused=True)
        return (out, *(gradient for gradient in gradients if gradient is not None))

    counted = count(request, name, causal, q.shape[2])
    if not counted.both.needed:
        return {FORWARD: Task(forward), TRAINING: Task(training)}
    return {FORWARD: Task(forward, counted.forward), TRAINING: Task(training, counted.both)}


def _favor(request: AttentionRequest, causal: bool) -> Attention:
    return partial(
        favor_attention, causal=causal, kernel=request.kernel, features=request.features, backend=request.backend
    )


def _window(request: AttentionRequest, causal: bool) -> Attention:
    if request.window < 1:
        raise Absent("asked for with --window 0: there is no window")
    return partial(
        favor_attention,
        causal=causal,
        kernel=request.kernel,
        features=request.features,
        window=request.window,
        backend=request.backend,
    )


def _exact(request: AttentionRequest, causal: bool) -> Attention:
    return partial(F.scaled_dot_product_attention, is_causal=causal)


def _opt(request: AttentionRequest, causal: bool) -> Attention:
    return lambda q, k, v: v.clone()


def _performer_pytorch(request: AttentionRequest, causal: bool) -> Attention:
    peer = _import("performer_pytorch", "performer-pytorch")
    if request.kernel not in ("softmax", "relu"):
        raise Absent(f"has no kernel {request.kernel!r}")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its CUDA extension is missing
        attention: torch.nn.Module = peer.FastAttention(
            dim_heads=request.head_dim,
            nb_features=request.features,
            causal=causal,
            generalized_attention=request.kernel == "relu",
        )
    return attention.to(request.device)


def _fast_transformers(request: AttentionRequest, causal: bool) -> Attention:
    attentions = _import("fast_transformers.attention", "pytorch-fast-transformers")
    maps = _import("fast_transformers.feature_maps", "pytorch-fast-transformers")
    masking = _import("fast_transformers.masking", "pytorch-fast-transformers")
    if request.kernel != "softmax":
        raise Absent(f"has no kernel {request.kernel!r}")
    kind = attentions.CausalLinearAttention if causal else attentions.LinearAttention
    attention = kind(request.head_dim, feature_map=maps.Favor.factory(n_dims=request.features)).to(request.device)
    attention.feature_map.new_feature_map(torch.device(request.device))
    attention.feature_map.new_feature_map = lambda device: None  # it would draw again in every call

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, length, _ = q.shape
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, L, H, D)
        triangle = masking.TriangularCausalMask if causal else masking.FullMask
        lengths = masking.LengthMask(torch.full((batch,), length, device=q.device))
        out: Tensor = attention(q, k, v, triangle(length, device=q.device), lengths, lengths)
        return out.transpose(1, 2)

    return call


def _fla(request: AttentionRequest, causal: bool) -> Attention:
    linear = _import("fla.ops.linear_attn", "flash-linear-attention")
    if not causal:
        raise Absent("has causal attention only")
    if request.kernel != "softmax":
        raise Absent(f"measured with the kernel 'softmax' only, not {request.kernel!r}")
    omega = projection_matrix(request.features, request.head_dim, device=torch.device(request.device))

    def features(x: Tensor) -> Tensor:
        scaled = x.float() * request.head_dim**-0.25
        exponent = scaled @ omega.T - scaled.square().sum(-1, keepdim=True) / 2
        return torch.exp(exponent - exponent.amax().detach()).to(x.dtype).transpose(1, 2)  # (B, L, H, m)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = linear.chunk_linear_attn(features(q), features(k), v.transpose(1, 2), scale=1.0)[0]
        return out.transpose(1, 2)

    return call


def _import(module: str, distribution: str) -> ModuleType:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Absent(f"not installed ({distribution})") from None
    try:
        return importlib.import_module(module)
    except Exception as error:  # fla raises a RuntimeError where there is no GPU
        raise Absent(f"{distribution} is installed but cannot be imported here: {error}") from error


_BUILDERS: dict[str, Callable[[AttentionRequest, bool], Attention]] = {
    "favor": _favor,
    "window": _window,
    "exact": _exact,
    "performer-pytorch": _performer_pytorch,
    "fast-transformers": _fast_transformers,
    "fla": _fla,
    "opt": _opt,
}
