"""The parts of a Performer: block of attention and MLP. Axes: B batch, L length, E width."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from longseq.attention import FavorAttention, RecurrentState, SlicedDocuments
from longseq.attention.carried import State
from longseq.attention.narrow import Linear, narrowed
from longseq.attention.tiles import pointwise
from longseq.models.norm import Norm
from longseq.models.spec import PerformerSpec


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + MLP(norm(x)); post-norm: norm(x + attention(x)) and so on."""

    def __init__(self, spec: PerformerSpec, layer: int):
        super().__init__()
        self.tile = spec.tile
        self.post_norm = spec.norm == "post"
        backend = "torch" if self.post_norm else spec.backend  # a norm's result is the residual then: in fp32
        self.attention_norm = Norm(spec.dim, spec.norm_eps, backend)
        self.attention = FavorAttention(
            spec.dim,
            spec.heads,
            causal=spec.causal,
            bias=spec.attention_bias,
            seed=spec.seed,
            layer=layer,
            options=spec,
        )
        self.mlp_norm = Norm(spec.dim, spec.norm_eps, backend)
        self.mlp = nn.Sequential(Linear(spec.dim, spec.ffn_dim), nn.GELU(), Linear(spec.ffn_dim, spec.dim))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self, x_BLE: Tensor, padding: Tensor | None, segments: Tensor | SlicedDocuments | None, rotary: Tensor | None
    ) -> Tensor:
        """x (B, L, E); padding (B, L) bool, True where a token is real; segments (B, L) integers; or None."""
        if not 0 < self.tile < x_BLE.shape[1]:
            with self._narrowed():
                x_BLE, normed = self._begin(x_BLE)
                mixed = self.attention(normed, padding=padding, segments=segments, rotary=rotary)
                return self._add(x_BLE, mixed)
        tile, norm = self.tile, None if self.post_norm else self.attention_norm
        mixed = self.attention(x_BLE, padding=padding, segments=segments, rotary=rotary, norm=norm, tile=tile)
        learned = [*self.mlp_norm.parameters(), *self.mlp.parameters()]
        learned += self.attention_norm.parameters() if self.post_norm else []
        random = self.training and self.dropout.p > 0
        return pointwise(lambda *parts: (self._add(*parts),), tile, (x_BLE, mixed), learned, random=random)[0]

    def carry(self, x_BTE: Tensor, state: State, rotary: Tensor | None) -> tuple[Tensor, State]:
        """The forward pass of a causal block over the next tile of a sequence, and the attention's state behind it."""
        with self._narrowed():
            x_BTE, normed = self._begin(x_BTE)
            mixed, state = self.attention(normed, rotary=rotary, carried=state)
            return self._add(x_BTE, mixed), state

    def prefill(self, x_BLE: Tensor, padding: Tensor | None, rotary: Tensor | None) -> tuple[Tensor, RecurrentState]:
        """The forward pass over a prompt, and the attention's state after it."""
        x_BLE, normed = self._begin(x_BLE)
        mixed, state = self.attention.prefill(normed, padding=padding, rotary=rotary)
        return self._add(x_BLE, mixed), state

    def decode(self, x_BLE: Tensor, state: RecurrentState, rotary: Tensor | None) -> tuple[Tensor, RecurrentState]:
        """The next position, or the next few."""
        x_BLE, normed = self._begin(x_BLE)
        mixed, state = self.attention.decode(normed, state, rotary=rotary)
        return self._add(x_BLE, mixed), state

    def _narrowed(self) -> AbstractContextManager[None]:
        return narrowed([self.attention.qkv, self.attention.out, self.mlp[0], self.mlp[2]])

    def _begin(self, x_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """x, and what attention reads of it."""
        return (x_BLE, x_BLE) if self.post_norm else self.attention_norm(x_BLE, sums=True)

    def _add(self, x_BLE: Tensor, mixed: Tensor) -> Tensor:
        mixed = self.dropout(mixed)
        if self.post_norm:
            x_BLE = self.attention_norm(x_BLE + mixed)
            return self.mlp_norm(x_BLE + self.dropout(self.mlp(x_BLE)))
        x_BLE, normed = self.mlp_norm(x_BLE, mixed)
        return x_BLE + self.dropout(self.mlp(normed))
