"""One learning rate for models of all widths: µP (Yang et al. 2022, arXiv 2203.03466, table 3, without multipliers).

With r = optim.base_dim / model.dim, in a family of one depth, head_dim and ratio of ffn_dim to dim:

    weights                    begin with       AdamW's rate    Muon's rate
    embedding, norms, biases   what they have   lr              –
    matrices of the blocks     √r of it         lr · r          lr · √r
    the head                   r of it          lr · r          –

AdamW moves each weight alike, and what a matrix makes of its inputs then moves by their number. A step of Muon here
has singular values of 0.2 lr √max(rows, columns), whatever the gradient; what must not grow with the width is the
spectral norm of a step (Yang, Simon and Bernstein 2023, arXiv 2310.17813), hence the root. Weight decay is divided by
what the rate is multiplied by, so that a step forgets as much at every width, without which rates do not transfer
(Kosson et al. 2025, arXiv 2510.19093). Logits of attention stay as they are, as heads keep their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from longseq.config.training import OptimConfig


@dataclass(frozen=True)
class Rates:
    """What a model's groups of weights have of ``optim.lr`` and ``optim.weight_decay``: factors of the rate."""

    matrices: float  # AdamW's
    muon: float

    @staticmethod
    def of(config: OptimConfig, dim: int) -> Rates:
        share = config.base_dim / dim if config.base_dim else 1.0
        return Rates(share, math.sqrt(share))

    def groups(self, config: OptimConfig) -> list[dict[str, float]]:
        """lr and weight_decay of each group of optim.build_optimizer, in its order."""
        factors = [(self.matrices, config.weight_decay / self.matrices), (1.0, 0.0)]
        if config.name == "muon":
            factors.insert(0, (self.muon, config.weight_decay / self.muon))
        return [{"lr": config.lr * factor, "weight_decay": decay} for factor, decay in factors]


@torch.no_grad()
def begin_wide(model: nn.Module, config: OptimConfig, dim: int) -> None:
    """Give a new language model the initial weights of its width."""
    share = config.base_dim / dim if config.base_dim else 1.0
    if share == 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".attention.gate." not in name and not name.startswith(("embedding", "positions")):
            parameter.mul_(share if name in ("head.weight", "head.logits.weight") else math.sqrt(share))
