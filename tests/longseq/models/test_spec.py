"""What a PerformerSpec refuses, before anything is built."""

from __future__ import annotations

import pytest
import torch

from longseq.attention.feature_maps import feature_map, not_written
from longseq.attention.options import KERNELS, OWN_KERNELS, PAIRED_KERNELS, SIGNED_KERNELS
from longseq.models.spec import PerformerSpec

SIZES = {"vocabulary": 29, "dim": 32, "depth": 1, "heads": 2, "ffn_dim": 64, "causal": True}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel": "hyperbolic", "features": 7}, "attention.features=7 is odd"),
        ({"kernel": "cos", "window": 8}, "attention.window=8 and attention.kernel=cos"),
        ({"learned_share": True}, "no effect without attention.window"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PerformerSpec(**SIZES, **options)
    PerformerSpec(**SIZES, kind="exact", **options)  # where they say nothing


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tables_of_kernels_say_what_the_feature_maps_are(kernel):
    phi = feature_map(kernel, 8, 4, dtype=torch.float32)
    assert phi.positive == (kernel not in SIGNED_KERNELS)
    assert (not_written(phi, "C++") is None) == (kernel in OWN_KERNELS)
    if kernel in PAIRED_KERNELS:
        with pytest.raises(ValueError, match="is odd"):
            feature_map(kernel, 7, 4)
    elif kernel != "relu_direct":
        assert feature_map(kernel, 7, 4).features == 7
