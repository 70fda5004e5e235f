"""Causal attention with the roundings of a GPU's kernels, emulated: does a model learn as much with them?

What tensor cores multiply is rounded to ``dtype`` first, forward and backward: q, k, v and the projections (once), then
features, weights, states, and the gradients that meet them. Sums, exponents and log-scales are fp32; denominators sum
rounded weights, as numerators do. The formulas are those of :mod:`longseq.attention.scan` and
:mod:`longseq.attention.window`, written once more in plain PyTorch, so that an error of theirs is not repeated here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention import FavorAttention
from longseq.attention.call import per_row
from longseq.attention.feature_maps import PositiveExponential, feature_map
from longseq.attention.first_order import Saved, first_order
from longseq.attention.parts import Part, combine


class _Operand(torch.autograd.Function):
    """x as ``dtype`` holds it, in fp32 again; its gradient likewise, as a product of the backward pass takes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, values: bool) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype) if values else x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None, None


def mix(layer: FavorAttention, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What ``layer.mix`` gives for whole sequences, by operands of ``dtype``.

    Args:
        layer: causal, kernel "softmax", with features and a window, without forget gates.
        q, k, v: (B, H, L, D) fp32.
        dtype: torch.float32 rounds nothing.
    """
    options, window = layer.options, layer.options.window
    rates, share = (per_row(x, len(q), torch.float32) for x in (layer.decay, layer.log_share))
    phi = feature_map(
        options.kernel, options.features, layer.head_dim, seed=layer.seed, layer=layer.layer, draw=layer.draw,
        projection=options.projection,
    )  # fmt: skip
    assert isinstance(phi, PositiveExponential)
    assert layer.causal
    assert layer.gate is None
    assert phi.shift is None
    rows = (_Operand.apply(x.flatten(0, 1), dtype, True) for x in (q, k, v))
    behind = -q.shape[2] % window  # zeros behind the last position, which sees none of them
    q_, k_, v_ = (F.pad(x, (0, 0, 0, behind)).unflatten(1, (-1, window)) for x in rows)  # (N, c, w, ·)
    near, far = _near(q_, k_, v_, rates, dtype), _far(q_, k_, v_, phi, rates, dtype)
    out = combine([near, far if share is None else (far[0], far[1] + share)])[0]
    return _Operand.apply(out[:, : q.shape[2]].unflatten(0, q.shape[:2]), dtype, True)


def _near(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, dtype: torch.dtype) -> Part:
    """Keys less than w positions back: those of the query's own chunk and of the one before."""
    width = q.shape[2]
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1], x), dim=2) for x in (k, v))  # (N, c, 2w, ·)
    distance = torch.arange(width, 2 * width)[:, None] - torch.arange(2 * width)
    seen = ((distance >= 0) & (distance < width)).expand(q.shape[1], -1, -1).clone()
    seen[0, :, :width] = False
    scores = _Operand.apply(q @ k.mT, dtype, False) * q.shape[-1] ** -0.5
    if decay is not None:
        scores = scores - decay[..., None] * distance
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = _Operand.apply(torch.exp(scores - top), dtype, True)
    den = weights.sum(-1, keepdim=True)
    out = _Operand.apply(weights @ v / den, dtype, False)
    return out.flatten(1, 2), (den.log() + top).flatten(1, 2)


def _far(q: Tensor, k: Tensor, v: Tensor, phi: PositiveExponential, decay: Tensor | None, dtype: torch.dtype) -> Part:
    """Keys at least w positions back, by features: some of the chunk before, and the state of all earlier ones."""
    width = q.shape[2]
    weight = phi.weight.to(dtype).to(phi.weight.dtype)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        exponent = _Operand.apply(x @ weight.T, dtype, False)
        top = exponent.detach().amax(-1, keepdim=True)
        return _Operand.apply((exponent - top).clamp(min=-40.0).exp(), dtype, True), top - half + phi.log_constant

    fq, q_scale = features(q)
    fk, k_scale = (F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1] for x in features(k))  # the chunk before
    v = F.pad(v, (0, 0, 0, 0, 1, 0))[:, :-1]
    place = torch.arange(width)
    real = (torch.arange(q.shape[1]) > 0)[:, None, None]
    b = k_scale.masked_fill(~real, -torch.inf)  # (N, c, w, 1), decay counted from the chunk's start
    fade = torch.zeros(len(q), 1, 1) if decay is None else decay
    b = b + fade[..., None] * place[:, None]
    seen = (place[:, None] >= place).expand(q.shape[1], -1, -1)
    log_weights = b.mT.masked_fill(~seen, -torch.inf)  # of keys j for queries i, but for −γ(i + w)
    inside = fq @ fk.mT
    sums, ones, scales = [v.new_zeros(len(q), fk.shape[-1], v.shape[-1])], [fk.new_zeros(len(q), fk.shape[-1], 1)], []
    scale = b.new_full((len(q), 1, 1), -1e30)
    for at in range(q.shape[1]):
        scales.append(scale)
        after = torch.maximum(scale, b[:, at].amax(1, keepdim=True)).detach()
        entering = torch.exp(b[:, at] - after)
        left = torch.exp(scale - after)
        sums.append(sums[-1] * left + _Operand.apply(fk[:, at] * entering, dtype, True).mT @ v[:, at])
        ones.append(ones[-1] * left + fk[:, at].mT @ entering)
        scale = after - fade * width
    state = _Operand.apply(torch.stack(sums[:-1], 1), dtype, True), torch.stack(ones[:-1], 1)
    c = torch.stack(scales, 1)  # (N, c, 1, 1)
    top = torch.maximum(log_weights.detach().amax(-1, keepdim=True), c)
    weights = _Operand.apply(inside * torch.exp(log_weights - top), dtype, True)
    read = torch.exp(c - top)
    num = weights @ v + read * (fq @ state[0])
    den = weights.sum(-1, keepdim=True) + read * (fq @ state[1])
    blind = ~real.expand_as(den)
    lse = den.masked_fill(blind, 1.0).log() + top + q_scale - fade[..., None] * (place[:, None] + width)
    out = _Operand.apply(num / den.masked_fill(blind, 1.0), dtype, False)
    return out.masked_fill(blind, 0.0).flatten(1, 2), lse.masked_fill(blind, -1e30).flatten(1, 2)
