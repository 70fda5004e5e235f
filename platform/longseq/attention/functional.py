"""The one door to attention: picks the kernel, the path and the backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longseq.attention.bidirectional import bidirectional_attention
from longseq.attention.causal import causal_attention
from longseq.attention.feature_maps import FEATURE_MAPS, FeatureMap
from longseq.attention.projections import projection_matrix

KERNELS = tuple(FEATURE_MAPS)


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    kernel: str = "softmax",
    features: int = 256,
    key_padding: Tensor | None = None,
    seed: int = 0,
    layer: int = 0,
    draw: int = 0,
) -> Tensor:
    """FAVOR+ attention (Choromanski et al. 2020, arXiv 2009.14794), linear in the length.

    A stand-in for ``F.scaled_dot_product_attention``: ``kernel="softmax"`` approximates it, with an error that falls
    as ``features`` grows and grows steeply with the norms of q and k. Features, sums and denominators are computed
    in fp32 (float64 for float64 inputs) whatever the inputs' dtype, also under autocast. Up to a standard deviation of
    about 4 of q and k (at head_dim 64) the result is that of the quadratic formula to 1e-5 … 3e-5. Beyond, it stays
    finite and a weighted mean of the values, but fp32's range no longer holds every product of two features.

    Args:
        q, k: (batch, heads, length, head_dim). They are scaled by head_dim^-1/4 each.
        v: (batch, heads, length, value_dim).
        causal: a query sees the keys up to its own position, and is independent of later ones to the last bit.
        kernel: "softmax" (positive random features) or "relu" (ReLU of random projections plus 1e-3).
        features: number of random features, m.
        key_padding: (batch, length) bool, True where a key is real; False hides it from every query.
        seed, layer, draw: the projection matrix is a function of these three numbers.

    Returns:
        (batch, heads, length, value_dim), the dtype of v. A query that sees no key gets zeros.

    Raises:
        ValueError: for an unknown kernel or shapes that do not fit together.
    """
    if kernel not in FEATURE_MAPS:
        raise ValueError(f"unknown kernel {kernel!r}; the kernels are {', '.join(KERNELS)}")
    _check_shapes(q, k, v, causal, key_padding)
    *rows, _, value_dim = v.shape
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    omega = projection_matrix(features, q.shape[-1], seed=seed, layer=layer, draw=draw, device=q.device, dtype=dtype)
    hidden = None if key_padding is None else ~key_padding.repeat_interleave(q.shape[1], dim=0)
    feature_map: FeatureMap = FEATURE_MAPS[kernel](omega)
    attention = causal_attention if causal else bidirectional_attention
    with torch.autocast(q.device.type, enabled=False):
        q, k, v_ = (t.flatten(0, 1).to(dtype) for t in (q, k, v))
        out = attention(q, k, v_, hidden, feature_map)
    return out.view(*rows, q.shape[-2], value_dim).to(v.dtype)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_padding: Tensor | None = None
) -> Tensor:
    """Softmax attention by ``F.scaled_dot_product_attention``: arguments and result as of :func:`favor_attention`."""
    _check_shapes(q, k, v, causal, key_padding)
    if key_padding is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    visible = key_padding[:, None, None, :]
    if causal:
        visible = visible & torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    blind = ~visible.any(-1, keepdim=True)  # such a row would be NaN
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind).masked_fill(blind, 0.0)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_padding: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must be (batch, heads, length, dim), got {shapes}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"batch, heads, key length or head_dim differ: {shapes}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many queries as keys: {shapes}")
    if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"key_padding must be bool of shape {(k.shape[0], k.shape[2])}, True where a key is real; "
            f"got {key_padding.dtype} {tuple(key_padding.shape)}"
        )
