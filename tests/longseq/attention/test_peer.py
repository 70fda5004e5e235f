"""The same numbers as performer-pytorch, where its stabilisers do not bite.

Its features carry an epsilon (1e-4) and a maximum over all keys. Called with eps=0 on inputs of ordinary size, both
vanish from the quotient and the two implementations must agree. https://github.com/lucidrains/performer-pytorch
"""

from __future__ import annotations

import pytest
import torch

from longseq.attention import favor_attention, projection_matrix

pytestmark = pytest.mark.interfaces

peer = pytest.importorskip("performer_pytorch.performer_pytorch", reason="performer-pytorch is not installed")

LENGTH, HEAD_DIM, FEATURES = 150, 32, 64


@pytest.fixture
def qkv():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, LENGTH, HEAD_DIM, generator=rng, dtype=torch.float64) for _ in range(3)]


def peer_features(kernel: str, x: torch.Tensor, is_query: bool) -> torch.Tensor:
    omega = projection_matrix(FEATURES, HEAD_DIM, dtype=torch.float64)
    if kernel == "softmax":
        return peer.softmax_kernel(x, projection_matrix=omega, is_query=is_query, eps=0.0)
    return peer.generalized_kernel(x, projection_matrix=omega, kernel_epsilon=1e-3)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_bidirectional_attention_agrees(kernel, qkv):
    q, k, v = qkv
    theirs = peer.linear_attention(peer_features(kernel, q, True), peer_features(kernel, k, False), v)
    ours = favor_attention(q, k, v, kernel=kernel, features=FEATURES)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_causal_attention_agrees(kernel, qkv):
    q, k, v = qkv
    theirs = peer.causal_linear_attention_noncuda(
        peer_features(kernel, q, True), peer_features(kernel, k, False), v, chunk_size=64, eps=0.0
    )
    ours = favor_attention(q, k, v, kernel=kernel, features=FEATURES, causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_its_defaults_agree_to_the_size_of_its_epsilon(qkv):
    """The module as users call it, fp32 and eps=1e-4, on inputs small enough for the epsilon to stay small."""
    q, k, v = (t.float() for t in qkv)
    q, k = 0.3 * q, 0.3 * k
    module = peer.FastAttention(dim_heads=HEAD_DIM, nb_features=FEATURES, causal=False)
    module.projection_matrix = projection_matrix(FEATURES, HEAD_DIM)
    torch.testing.assert_close(favor_attention(q, k, v, features=FEATURES), module(q, k, v), rtol=0, atol=5e-4)
