"""The parts of a Performer: block of attention and MLP. Axes: B batch, L length, E width."""

from __future__ import annotations

from torch import Tensor, nn

from longseq.attention import FavorAttention, RecurrentState, SlicedDocuments
from longseq.models.spec import PerformerSpec


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, spec: PerformerSpec, layer: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(spec.dim)
        self.attention = FavorAttention(
            spec.dim,
            spec.heads,
            causal=spec.causal,
            kind=spec.attention,
            kernel=spec.kernel,
            features=spec.features,
            window=spec.window,
            projection=spec.projection,
            qk_norm=spec.qk_norm,
            learned_share=spec.learned_share,
            learned_decay=spec.learned_decay,
            seed=spec.seed,
            layer=layer,
            backend=spec.backend,
        )
        self.mlp_norm = nn.LayerNorm(spec.dim)
        self.mlp = nn.Sequential(nn.Linear(spec.dim, spec.ffn_dim), nn.GELU(), nn.Linear(spec.ffn_dim, spec.dim))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self, x_BLE: Tensor, padding: Tensor | None, segments: Tensor | SlicedDocuments | None, rotary: Tensor
    ) -> Tensor:
        """x (B, L, E); padding (B, L) bool, True where a token is real; segments (B, L) integers; or None."""
        mixed = self.attention(self.attention_norm(x_BLE), padding=padding, segments=segments, rotary=rotary)
        return self._add(x_BLE, mixed)

    def prefill(self, x_BLE: Tensor, padding: Tensor | None, rotary: Tensor) -> tuple[Tensor, RecurrentState]:
        """The forward pass over a prompt, and the attention's state after it."""
        mixed, state = self.attention.prefill(self.attention_norm(x_BLE), padding=padding, rotary=rotary)
        return self._add(x_BLE, mixed), state

    def decode(self, x_BLE: Tensor, state: RecurrentState, rotary: Tensor) -> tuple[Tensor, RecurrentState]:
        """The next position, or the next few."""
        mixed, state = self.attention.decode(self.attention_norm(x_BLE), state, rotary=rotary)
        return self._add(x_BLE, mixed), state

    def _add(self, x_BLE: Tensor, mixed: Tensor) -> Tensor:
        x_BLE = x_BLE + self.dropout(mixed)
        return x_BLE + self.dropout(self.mlp(self.mlp_norm(x_BLE)))
