"""Models whose convolutions and value residuals are not those of the beginning, which hardly matter."""

from __future__ import annotations

import torch
from torch import nn

from longseq.models.performer import PerformerLM

# Every option of a block that is not a plain Transformer's, under the names of a spec.
MODERN = {
    "norm_kind": "rmsnorm",
    "ffn": "swiglu",
    "bias": False,
    "conv": 4,
    "value_residual": True,
    "qk_norm": True,
}


@torch.no_grad()
def mix(model: PerformerLM) -> PerformerLM:
    """Taps that all count, gates that read their token, and shares of the first layer's values between 0 and 1."""
    for block in model.blocks:
        if block.attention.conv is not None:
            nn.init.normal_(block.attention.conv.weight, std=0.5)
        if block.attention.gate is not None:
            nn.init.normal_(block.attention.gate.weight, std=0.5)
        if block.attention.value_mix is not None:
            nn.init.uniform_(block.attention.value_mix)
    return model
