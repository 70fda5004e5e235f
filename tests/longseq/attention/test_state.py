"""The state algebra: merging is what it says, in any order, at any scale."""

from __future__ import annotations

import torch

from longseq.attention.state import AttentionState, with_ones


def state(seed: int, shift: float, keys: int = 7) -> tuple[AttentionState, torch.Tensor]:
    """A state of random keys whose log-scales lie about ``shift``, and Σ φ [v, 1] in float64, times e^-shift."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.rand(2, keys, 5, generator=rng)
    scale = shift + torch.randn(2, keys, 1, generator=rng)
    v = torch.randn(2, keys, 3, generator=rng)
    weighted = (features.double() * torch.exp(scale.double() - shift)).mT
    expected = torch.cat((weighted @ v.double(), weighted.sum(-1, True)), -1)
    return AttentionState.of(features, scale, with_ones(v)), expected


def whole(s: AttentionState, shift: float) -> torch.Tensor:
    return s.sums.double() * torch.exp(s.log_scale.double() - shift)


def test_a_merged_state_is_the_state_of_all_keys():
    (a, a_sum), (b, b_sum) = state(0, 0.0), state(1, 0.0)
    torch.testing.assert_close(whole(a.merge(b), 0.0), a_sum + b_sum, rtol=1e-5, atol=1e-6)


def test_merging_commutes_and_associates_up_to_rounding():
    a, b, c = (state(seed, shift)[0] for seed, shift in ((0, 3.0), (1, -4.0), (2, 1.0)))
    expected = whole(a.merge(b).merge(c), 0.0)
    torch.testing.assert_close(whole(c.merge(a.merge(b)), 0.0), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole(a.merge(b.merge(c)), 0.0), expected, rtol=1e-5, atol=1e-5)


def test_an_empty_state_is_neutral_even_beside_tiny_scales():
    filled, _ = state(3, -1e6)
    empty = AttentionState.empty(2, 5, 3, like=filled.sums)
    for merged in (empty.merge(filled), filled.merge(empty)):
        assert torch.equal(merged.sums, filled.sums)
        assert torch.equal(merged.log_scale, filled.log_scale)
    assert torch.all(empty.merge(empty).sums == 0)


def test_scales_beyond_the_range_of_fp32_survive():
    (huge, expected), (small, _) = state(0, 500.0), state(1, -500.0)
    merged = huge.merge(small)
    assert merged.sums.isfinite().all()
    torch.testing.assert_close(whole(merged, 500.0), expected, rtol=1e-5, atol=1e-6)
