"""Models whose convolutions, frames and value residuals are not those of the beginning, which hardly matter."""

from __future__ import annotations

import torch
from torch import nn

from longseq.attention.frames import Frame
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
        if block.attention.frame is not None:
            settle(block.attention.frame)
    return model


@torch.no_grad()
def settle(frame: Frame) -> None:
    """Give it constants, as if they had been found, and a covariance."""
    if frame.covariance is not None:
        nn.init.normal_(frame.covariance, std=0.1)
    if frame.kernel:
        heads, _, d = frame.constants.shape
        to_q = torch.eye(d) + 0.2 * torch.randn(heads, d, d).double()
        a = -0.12 * torch.arange(1, d + 1) / d
        centre = 0.3 * torch.randn(heads, 1, d)
        rows = torch.cat((to_q, torch.linalg.inv(to_q).mT, centre, a.expand(heads, 1, d)), dim=1)
        frame.constants.copy_(rows.contiguous().view(torch.int64))
