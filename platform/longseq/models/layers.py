"""The parts of a Performer: block of attention and MLP. Axes: B batch, L length, E width."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from longseq.attention import FavorAttention, RecurrentState, SlicedDocuments
from longseq.attention.call import Call
from longseq.attention.carried import State
from longseq.attention.narrow import narrowed
from longseq.attention.tiles import pointwise
from longseq.models.mlp import SwiGLU, mlp
from longseq.models.norm import norm
from longseq.models.spec import PerformerSpec


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + MLP(norm(x)); post-norm: norm(x + attention(x)) and so on."""

    def __init__(self, spec: PerformerSpec, layer: int):
        super().__init__()
        self.tile = spec.tile
        self.post_norm = spec.norm == "post"
        backend = "torch" if self.post_norm else spec.backend  # a norm's result is the residual then: in fp32
        self.attention_norm = norm(spec.dim, spec.norm_eps, spec.norm_kind, spec.bias, backend)
        self.attention = FavorAttention(
            spec.dim,
            spec.heads,
            causal=spec.causal,
            bias=spec.attention_bias,
            conv=spec.conv,
            value_residual=spec.value_residual,
            seed=spec.seed,
            layer=layer,
            options=spec.layer(layer),
        )
        self.mlp_norm = norm(spec.dim, spec.norm_eps, spec.norm_kind, spec.bias, backend)
        self.mlp = mlp(spec.dim, spec.hidden, spec.ffn, spec.bias)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self,
        x_BLE: Tensor,
        padding: Tensor | None,
        segments: Tensor | SlicedDocuments | None,
        rotary: Tensor | None,
        first: Tensor | None = None,
        *,
        branch: Tensor | None = None,
        apart: bool = False,
    ) -> Any:
        """x (B, L, E); padding (B, L) bool, True where a token is real; segments (B, L) integers; or None.

        first: with ``value_residual`` the values that the block before has returned, None for the first block. Then
        all methods return what the next block is given as ``first`` last.
        branch: what is still to be added to x.
        apart: return what the MLP adds by itself, behind x: the next block's norm adds it in one kernel.

        The last two are for blocks that norm first, and for no tiles.
        """
        assert not (apart or branch is not None) or not (self.post_norm or 0 < self.tile < x_BLE.shape[1])
        options = {"padding": padding, "segments": segments, "rotary": rotary, "first": first}
        if not 0 < self.tile < x_BLE.shape[1]:
            with self._narrowed():
                x_BLE, normed = self._begin(x_BLE, branch)
                mixed, *handed = self._attended(self.attention(normed, **options))
                if apart:
                    return *self._parts(x_BLE, mixed), *handed
                return self._results(self._add(x_BLE, mixed), handed)
        tile, norm = self.tile, None if self.post_norm else self.attention_norm
        mixed, *handed = self._attended(self.attention(x_BLE, norm=norm, tile=tile, **options))
        learned = [*self.mlp_norm.parameters(), *self.mlp.parameters()]
        learned += self.attention_norm.parameters() if self.post_norm else []
        random = self.training and self.dropout.p > 0
        (x_BLE,) = pointwise(lambda *parts: (self._add(*parts),), tile, (x_BLE, mixed), learned, random=random)
        return self._results(x_BLE, handed)

    def carry(
        self, x_BTE: Tensor, state: State, rotary: Tensor | None, first: Tensor | None = None, *, wide: bool = False
    ) -> tuple[Any, ...]:
        """The forward pass of a causal block over the next tile of a sequence, and the attention's state behind it."""
        with self._narrowed():
            x_BTE, normed = self._begin(x_BTE)
            mixed, *rest = self.attention(normed, rotary=rotary, carried=state, wide=wide, first=first)
            return self._add(x_BTE, mixed), *rest

    def inside(
        self, x_BTE: Tensor, beside: tuple[int, int], rotary: Tensor | None, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Call]:
        """q, k, v of a part of a sequence and what is asked for there, as of the attention's."""
        with self._narrowed():
            return self.attention.inside(self._begin(x_BTE)[1], beside, rotary, first)[0]

    def read(
        self,
        attend: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Any]],
        own: tuple[int, int],
        x_BTE: Tensor,
        beside: tuple[int, int],
        rotary: Tensor | None,
        first: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The forward pass over a tile, what ``attend`` leaves, and the first layer's values where q, k and v are.

        attend: what :meth:`inside` gives to the tile's results (B, H, T, D), and what it leaves.
        own: how many of x's positions are before and behind the tile.
        """
        with self._narrowed():
            x_BTE, normed = self._begin(x_BTE)
            inside, first = self.attention.inside(normed, beside, rotary, first)
            mixed, left = attend(*inside)
            made = self._add(x_BTE[:, own[0] : x_BTE.shape[1] - own[1]], self.attention.merge(mixed))
            return (made, left, first) if self.attention.value_residual else (made, left)

    def prefill(
        self, x_BLE: Tensor, padding: Tensor | None, rotary: Tensor | None, first: Tensor | None = None
    ) -> tuple[Any, ...]:
        """The forward pass over a prompt, and the attention's state after it."""
        x_BLE, normed = self._begin(x_BLE)
        mixed, *rest = self.attention.prefill(normed, padding=padding, rotary=rotary, first=first)
        return self._add(x_BLE, mixed), *rest

    def decode(
        self, x_BLE: Tensor, state: RecurrentState, rotary: Tensor | None, first: Tensor | None = None
    ) -> tuple[Any, ...]:
        """The next position, or the next few, and the attention's state after them."""
        x_BLE, normed = self._begin(x_BLE)
        mixed, *rest = self.attention.decode(normed, state, rotary=rotary, first=first)
        return self._add(x_BLE, mixed), *rest

    def matrices(self) -> dict[nn.Parameter, int]:
        """The weights of the linear maps, each with how many maps it holds on top of each other."""
        gated = 2 if isinstance(self.mlp[1], SwiGLU) else 1
        maps = ((self.attention.qkv, 3), (self.attention.out, 1), (self.mlp[0], gated), (self.mlp[2], 1))
        return {linear.weight: count for linear, count in maps}  # type: ignore[misc]

    def _attended(self, found: Any) -> tuple[Tensor, ...]:
        return found if self.attention.value_residual else (found,)

    def _results(self, x_BLE: Tensor, handed: list[Tensor]) -> Any:
        return (x_BLE, *handed) if handed else x_BLE

    def _narrowed(self) -> AbstractContextManager[None]:
        return narrowed([self.attention.qkv, self.attention.out, self.mlp[0], self.mlp[2]])

    def _begin(self, x_BLE: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, and what attention reads of it."""
        return (x_BLE, x_BLE) if self.post_norm else self.attention_norm(x_BLE, branch, sums=True)

    def _add(self, x_BLE: Tensor, mixed: Tensor) -> Tensor:
        if self.post_norm:
            x_BLE = self.attention_norm(x_BLE + self.dropout(mixed))
            return self.mlp_norm(x_BLE + self.dropout(self.mlp(x_BLE)))
        x_BLE, branch = self._parts(x_BLE, mixed)
        return x_BLE + branch

    def _parts(self, x_BLE: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """x with attention, and what the MLP adds, of a block that norms first."""
        x_BLE, normed = self.mlp_norm(x_BLE, self.dropout(mixed))
        return x_BLE, self.dropout(self.mlp(normed))
