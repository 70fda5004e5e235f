"""What a PerformerSpec refuses, before anything is built."""

from __future__ import annotations

import pytest
import torch

from longseq.attention.feature_maps import feature_map
from longseq.models.spec import KERNELS, PAIRED_KERNELS, SIGNED_KERNELS, PerformerSpec

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
    PerformerSpec(**SIZES, attention="exact", **options)  # where they say nothing


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_specs_tables_of_kernels_are_those_of_the_feature_maps(kernel):
    assert feature_map(kernel, 8, 4, dtype=torch.float32).positive == (kernel not in SIGNED_KERNELS)
    if kernel in PAIRED_KERNELS:
        with pytest.raises(ValueError, match="must be even"):
            feature_map(kernel, 7, 4)
    elif kernel != "relu_direct":
        assert feature_map(kernel, 7, 4).features == 7
