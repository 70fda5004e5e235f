"""The Performer language model: embedding, pre-norm blocks, head. Causal or masked by its spec."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longseq.attention import FavorAttention, rotary_table
from longseq.models.layers import Block
from longseq.models.spec import PerformerSpec


class PerformerLM(nn.Module):
    """Token ids in, logits out.

    The weights are those of a plain Transformer: ``attention="exact"`` and ``"favor"`` exchange on one state dict,
    and projections are no part of it (they follow from the seed, the layer and the optimiser step).
    """

    def __init__(self, spec: PerformerSpec):
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.dim)
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.depth))
        self.norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, spec.vocabulary, bias=False)
        self._initialise()

    def forward(self, tokens: Tensor, padding: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Next-token logits (causal) or logits of each position's own token (masked).

        Args:
            tokens: (B, L) token ids.
            padding: (B, L) bool, True where a token is real; False hides it from attention. None: all are real.
            segments: (B, L) integers, documents packed into one row: attention stays within a run of equal numbers.
                None: a row is one document.

        Returns:
            (B, L, vocabulary), in the dtype of the weights.
        """
        x = self.dropout(self.embedding(tokens))  # (B, L, E)
        rotary = rotary_table(torch.arange(tokens.shape[1], device=tokens.device), self.spec.head_dim)
        for block in self.blocks:
            if self.spec.activation_checkpointing and self.training:
                # Reentrant: ZeRO-3 gathers weights in module hooks, and the other kind checks saved shapes against
                # weights that are partitioned again by then.
                x = checkpoint(block, x, padding, segments, rotary, use_reentrant=True)
            else:
                x = block(x, padding, segments, rotary)
        return self.head(self.norm(x))

    def set_step(self, step: int) -> None:
        """Use the projections that belong to optimiser step ``step``."""
        for module in self.modules():
            if isinstance(module, FavorAttention):
                module.draw = self.spec.draw_at(step)

    def _initialise(self) -> None:
        # GPT-2's scheme: 0.02, and residual branches shrunk so that the sum over the depth keeps its variance.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                shrink = (
                    math.sqrt(2 * self.spec.depth) if name.endswith(("attention.out.weight", "mlp.2.weight")) else 1
                )
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
