"""The FLOP formulas, against torch's own count of what our implementation computes."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longseq.attention.backends import choice as backends
from longseq.attention.feature_maps import feature_map
from longseq.attention.scan import CHUNK, Rows
from longseq.measure import flops

HEADS, LENGTH, DIM, FEATURES = 2, 6 * CHUNK, 24, 40


def counted(causal: bool) -> tuple[float, float]:
    """Forward and backward FLOPs a token and head that torch counts: of the backend, as an operator is opaque to it."""
    # The products that are added in place are missing in torch's own table.
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, *rest, out_shape=None, **options: 2 * prod(a) * b[-1]}
    q, k, v, grad = (torch.randn(HEADS, LENGTH, DIM) for _ in range(4))
    phi = feature_map("softmax", FEATURES, DIM)
    engine, rows = backends.choose("torch", phi, (q, k, v)), Rows(q, k, v, None, None, None, phi, 0)
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        if causal:
            done = engine.scan_forward(rows, None, True)
        else:
            out, kept = engine.bidirectional_forward(rows, None)
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        if causal:
            engine.scan_backward(rows, done.out, done.inverse_den, done.kept, grad, None, None, False)
        else:
            engine.bidirectional_backward(rows, None, out, kept, grad)
    return forward.get_total_flops() / (HEADS * LENGTH), backward.get_total_flops() / (HEADS * LENGTH)


def test_bidirectional_counts_are_exact():
    count = flops.favor(DIM, DIM, FEATURES)
    forward, backward = counted(causal=False)
    assert forward == pytest.approx(count.forward.needed, rel=0.01)
    assert backward == pytest.approx(count.backward.needed, rel=0.01)


def test_causal_counts_are_exact_but_for_the_unneeded_half_of_the_squares_and_the_states_built_again():
    whole_squares = flops.favor(DIM, DIM, FEATURES, 2 * CHUNK)
    forward, backward = counted(causal=True)
    assert forward == pytest.approx(whole_squares.forward.needed, rel=0.01)
    again = 2 * FEATURES * (DIM + 1)
    assert whole_squares.backward.needed * 0.99 <= backward <= (whole_squares.backward.needed + again) * 1.01


def test_the_strict_count_leaves_out_features_and_squares_computed_again():
    count = flops.favor(DIM, DIM, FEATURES, CHUNK)
    assert count.backward.needed - count.backward.strict == 4 * FEATURES * DIM + CHUNK / 2 * 2 * FEATURES
    assert count.forward.needed == count.forward.strict
    exact = flops.exact(DIM, DIM, 100)
    assert (exact.backward.needed, exact.backward.strict) == (2.5 * exact.forward.needed, 2 * exact.forward.needed)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_the_whole_length_is_exact_attention(causal):
    window = flops.windowed(DIM, DIM, FEATURES, length=999, window=2000, causal=causal, chunk=CHUNK)
    keys = sum(i + 1 if causal else 999 for i in range(999)) / 999
    # Bidirectional: a window reaches w - 1 to both sides, which is counted as if there were no ends.
    reach = keys if causal else 2 * (999 + 1) / 2 - 1
    assert window.forward.needed == pytest.approx(flops.exact(DIM, DIM, reach).forward.needed)
    assert window.both.needed == pytest.approx(flops.exact(DIM, DIM, reach).both.needed)


def test_a_window_adds_its_keys_to_the_scan():
    window = flops.windowed(DIM, DIM, FEATURES, length=10**6, window=100, causal=True, chunk=CHUNK)
    alone = flops.favor(DIM, DIM, FEATURES, CHUNK)
    assert window.forward.needed == pytest.approx(alone.forward.needed + 4 * 100 * DIM, rel=1e-3)
