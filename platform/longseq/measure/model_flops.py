"""Model FLOPs: the matrix products that one token of training needs, forward and backward.

A linear map of n weights costs 2n forward and 4n backward. Attention is counted as ``longseq.measure.flops`` does,
without what the backward pass computes again to spare memory: the share of the peak (MFU) that follows is that of
useful work (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from longseq.attention.scan import CHUNK
from longseq.measure import flops
from longseq.models.spec import PerformerSpec


def training_flops(spec: PerformerSpec, length: int) -> float:
    """FLOPs of one token in a sequence of ``length``, embedding look-ups and norms left out."""
    linear = spec.depth * (4 * spec.dim**2 + 3 * spec.dim * spec.conv) + spec.vocabulary * spec.dim
    linear += spec.depth * (3 if spec.ffn == "swiglu" else 2) * spec.dim * spec.hidden
    linear += spec.dim**2 if spec.head == "transform" else 0
    linear += spec.gates * spec.dim * spec.heads
    layers = (flops.attention(options, spec.head_dim, length, causal=spec.causal, chunk=CHUNK) for options in spec.plan)
    return 6 * linear + spec.heads * sum(layer.both.strict for layer in layers)
