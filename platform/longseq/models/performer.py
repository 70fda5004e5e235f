"""The Performer language model: embedding, pre-norm blocks, head. Causal or masked by its spec."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longseq.attention import ContextGroup, FavorAttention, RecurrentState, SlicedDocuments, rotary_table
from longseq.attention.carried import State
from longseq.attention.fused import fuses
from longseq.attention.tiles import recurrence
from longseq.errors import LongseqError
from longseq.models.head import Head, TransformHead
from longseq.models.layers import Block
from longseq.models.norm import norm
from longseq.models.offload import Offload
from longseq.models.positions import leading, positions_of, positions_of_slice
from longseq.models.spec import PerformerSpec


@dataclass(frozen=True, eq=False)
class DecodingState:
    """What a causal model must know of the tokens so far: one state per layer, and the next token's position (B,)."""

    layers: tuple[RecurrentState, ...]
    positions: Tensor

    def select(self, sequences: Tensor) -> DecodingState:
        """See :meth:`longseq.attention.RecurrentState.select`."""
        return DecodingState(tuple(layer.select(sequences) for layer in self.layers), self.positions[sequences])


class PerformerLM(nn.Module):
    """Token ids in, logits out.

    The weights are those of a plain Transformer: ``kind="exact"`` and ``"favor"`` exchange on one state dict, in all
    layers or in some, and projections are no part of it (they follow from the seed, the layer and the optimiser step).
    """

    def __init__(self, spec: PerformerSpec):
        super().__init__()
        self.spec = spec
        self.mask_token = spec.vocabulary - 1  # what spec.mask_scaling scales by
        self.embedding = nn.Embedding(spec.vocabulary, spec.dim)
        self.positions = nn.Embedding(spec.max_positions, spec.dim) if spec.position == "learned" else None
        self.embedding_norm = (
            norm(spec.dim, spec.norm_eps, spec.norm_kind, spec.bias, "torch") if spec.embedding_norm else None
        )
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.depth))
        last = norm(spec.dim, spec.norm_eps, spec.norm_kind, spec.bias, "torch")
        self.norm = last if spec.norm == "pre" else nn.Identity()
        self.head = (
            TransformHead(spec.dim, spec.vocabulary, spec.norm_eps)
            if spec.head == "transform"
            else Head(spec.dim, spec.vocabulary)
        )
        self.context: ContextGroup | None = None
        self._initialise()

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Any:
        """Next-token logits (causal) or logits of each position's own token (masked); with targets, their loss.

        Args:
            tokens: (B, L) token ids.
            padding: (B, L) bool, True where a token is real; False hides it from attention. None: all are real.
            segments: (B, L) integers, documents packed into one row: attention stays within a run of equal numbers.
                None: a row is one document. Positions count from a document's first token.
            targets: (B, L) token ids, −100 where nothing is scored. None: logits are wanted.

        Returns:
            (B, L, vocabulary), in the dtype of the weights; with targets the sum of their cross entropies (nats, fp32)
            and how many of them have the largest logit (int64), for which the logits of a few positions exist at a
            time.
        """
        if targets is not None and padding is None and segments is None and self._carries(tokens.shape[1]):
            return self._carried_loss(tokens, targets)
        return self.head(self.hidden(tokens, padding, segments), targets)

    def hidden(
        self,
        tokens: Tensor,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        layer: int | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """What the head reads of each position, (B, L, E); see :meth:`forward`.

        For those who want something else than the loss, but not the logits of all positions at once.

        layer: 0: the embedding alone, k: what block k gives; None: what the head reads.
        states: gets what enters each block, and last what is returned.
        """
        if layer == 0:
            return self.embedding(tokens)
        documents: Tensor | SlicedDocuments | None = segments
        if self.context is None:
            positions = positions_of(tokens, padding, segments)
        else:
            sliced = None if segments is None else self.context.documents(segments)
            documents, positions = sliced, positions_of_slice(tokens, sliced, self.context)
        x = self._embed(tokens, positions, padding)  # (B, L, E)
        rotary = self._rotary(positions)
        recompute = self.spec.recomputes(tokens.shape[1]) and torch.is_grad_enabled()
        if recompute and not x.requires_grad:
            x.requires_grad_()  # a frozen embedding: reentrant checkpoints give gradients only if their input wants one
        offload = Offload()
        first: list[Tensor] = []  # with spec.value_residual the first layer's values
        # On a GPU the norm that comes next adds what an MLP has made, in its own kernel.
        apart = not recompute and layer is None and states is None and self._norms_add(x)
        branch: Tensor | None = None
        for block in islice(self.blocks, layer):
            _note(states, x)
            if apart:
                x, branch, *first = block(x, padding, documents, rotary, *first, branch=branch, apart=True)
                continue
            if recompute and self.training:
                # Reentrant: ZeRO-3 gathers weights in module hooks, and the other kind checks saved shapes against
                # weights that are partitioned again by then.
                with offload.of(x) if self.spec.activation_offload else nullcontext():
                    found = checkpoint(block, x, padding, documents, rotary, *first, use_reentrant=True)
            else:
                found = block(x, padding, documents, rotary, *first)
            x, *first = found if self.spec.value_residual else (found,)
        x = x if branch is None else x + branch
        return _note(states, self.norm(x) if layer is None else x)

    def _norms_add(self, x: Tensor) -> bool:
        """Whether each block leaves its MLP's part to the next one's norm: a kernel less, and a tensor (B, L, E) more
        for the time of a block, which a backward pass keeps anyway. Forward hooks on blocks see both then."""
        spec = self.spec
        layered = spec.norm == "pre" and spec.norm_kind == "layernorm" and spec.bias
        if not layered or not torch.is_grad_enabled() or 0 < spec.tile < x.shape[1]:
            return False
        compiled = any(block._compiled_call_impl for block in self.blocks)  # which are to be one program
        return not compiled and fuses(x, spec.backend)

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, padding: Tensor | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, DecodingState]:
        """Read a prompt, to go on with :meth:`decode`. For a causal model in evaluation mode; no gradients.

        Args:
            tokens, padding: as of :meth:`read`.
            last_only: logits of the last position alone; all of a long prompt's may not fit into memory.

        Returns:
            Logits (B, L, vocabulary), as of the forward pass, or (B, 1, vocabulary); and the state.

        Raises:
            ValueError: if the model is not causal.
        """
        x, state = self.read(tokens, padding)
        return self.head(x[:, -1:] if last_only else x), state

    @torch.no_grad()
    def read(
        self, tokens: Tensor, padding: Tensor | None = None, *, states: list[Tensor] | None = None
    ) -> tuple[Tensor, DecodingState]:
        """As :meth:`prefill`, without the head.

        Args:
            tokens: (B, L) token ids; L may be 0.
            padding: (B, L) bool, True where a token is real. Pad in front: what is padded behind stays between the
                prompt and its continuation, and counts as distance.
            states: as of :meth:`hidden`.

        Returns:
            What the head reads, (B, L, E); and the state. Only in layers of kind "exact" does its size depend on L.
        """
        positions = positions_of(tokens, padding, None)
        x = self._embed(tokens, positions, padding)  # (B, L, E)
        rotary = self._rotary(positions)
        layers = []
        first: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            _note(states, x)
            x, state, *first = block.prefill(x, padding, rotary, *first)
            layers.append(state)
        following = tokens.new_full((len(tokens),), tokens.shape[1])
        if padding is not None:
            following = following - leading(padding)
        return _note(states, self.norm(x)), DecodingState(tuple(layers), following)

    @torch.no_grad()
    def decode(
        self, token: Tensor, state: DecodingState, *, states: list[Tensor] | None = None
    ) -> tuple[Tensor, DecodingState]:
        """One token more: token (B,) to the logits of its successor (B, vocabulary), and the state after it.

        The given state stays as it was: several continuations may start from it. ``states`` as of :meth:`hidden`.
        """
        x = self._embed(token[:, None], state.positions[:, None], None)  # (B, 1, E)
        rotary = self._rotary(state.positions[:, None])
        layers = []
        first: list[Tensor] = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            assert isinstance(block, Block)
            _note(states, x)
            x, after, *first = block.decode(x, before, rotary, *first)
            layers.append(after)
        return self.head(_note(states, self.norm(x))[:, 0]), DecodingState(tuple(layers), state.positions + 1)

    def check_position(self, position: int) -> None:
        """Raise a LongseqError if the model has not learned this position."""
        if self.positions is not None and position >= self.spec.max_positions:
            raise LongseqError(
                f"a sequence of {position + 1:,} tokens or more, but the model has learned "
                f"{self.spec.max_positions:,} positions (model.max_positions): give it shorter ones."
            )

    def set_step(self, step: int) -> None:
        """Use the projections that belong to optimiser step ``step``."""
        for module in self.modules():
            if isinstance(module, FavorAttention):
                module.draw = self.spec.draw_at(step)

    def _carries(self, length: int) -> bool:
        """Whether the loss of so long a row takes the way of :meth:`_carried_loss`."""
        calibrated = all(layer.calibrated for layer in self.modules() if isinstance(layer, FavorAttention))
        return self.spec.carries and self.context is None and length > self.spec.tile and calibrated

    def _carried_loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Sum of the losses and number of correct targets. One tile goes through all layers before the next begins.

        What is kept of the sequence is every layer's attention state before each tile: nothing has the size L × E.
        """

        def piece(start: int, stop: int, before: State) -> tuple[tuple[Tensor, ...], State]:
            x, behind = self.carry(tokens[:, start:stop], start, before)
            return self.head(x, targets[:, start:stop]), behind

        random = self.training and self.spec.dropout > 0
        return recurrence(
            piece, tokens.shape[1], self.spec.tile, list(self.parameters()), device=tokens.device, random=random
        )

    def carry(
        self,
        tokens: Tensor,
        start: int,
        before: State,
        *,
        wide: bool = False,
        layer: int | None = None,
        share: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """What the head reads of the next tile of a causal sequence, and all layers' attention states behind it.

        Args:
            tokens: (B, T) token ids, without padding.
            start: the first one's position.
            before: the states that the tile before has left, () before the first.
            wide: carry sums in float64, for sequences of any length; no gradients.
            layer: as of :meth:`hidden`, from 1 on.
            share: as of :meth:`entering`.

        Returns:
            (B, T, E), and the states of the layers it went through.
        """
        x, rotary = self.entering(tokens, start, share)
        behind: list[Tensor] = []
        first: list[Tensor] = []
        for block in islice(self.blocks, layer):
            assert isinstance(block, Block)
            size = block.attention.carried_tensors
            own, before = before[:size], before[size:]
            x, state, *first = block.carry(x, own, rotary, *first, wide=wide)
            behind += state
        return self.norm(x) if layer is None else x, tuple(behind)

    def entering(self, tokens: Tensor, start: int, share: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What enters the first block, (B, T, E), of a tile that begins at position ``start``; and its rotary table.

        share: (B,) of MASK in the whole rows, for ``spec.mask_scaling``; None: these tokens are all.
        """
        stop = start + tokens.shape[1]
        x = self._embed(tokens, torch.arange(start, stop, device=tokens.device), None, share)
        return x, self.rotary(start, stop)

    def rotary(self, start: int, stop: int) -> Tensor | None:
        """The rotary table of positions start…stop; None where positions are learned."""
        return self._rotary(torch.arange(start, stop, device=self.embedding.weight.device))

    def decoding_state(self, carried: State, positions: Tensor) -> DecodingState:
        """What :meth:`decode` goes on with behind tiles that :meth:`carry` has read; positions (B,), the next ones."""
        layers = []
        for block in self.blocks:
            assert isinstance(block, Block)
            size = block.attention.carried_tensors
            layers.append(block.attention.decoding_state(carried[:size], len(positions)))
            carried = carried[size:]
        return DecodingState(tuple(layers), positions)

    def set_context(self, context: ContextGroup | None) -> None:
        """From now on the forward pass gets this rank's slices of sequences that the group's ranks hold together.

        Slices are equally long on all of them; the last is padded behind, with ``padding``. Gradients are this rank's
        part of a sum over the ranks. None: whole sequences again.
        """
        self.context = context
        for module in self.modules():
            if isinstance(module, FavorAttention):
                module.context = context

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Inside, the forward pass gets whole sequences, and asks no other rank for anything."""
        context = self.context
        self.set_context(None)
        try:
            yield
        finally:
            self.set_context(context)

    def _embed(self, tokens: Tensor, positions: Tensor, padding: Tensor | None, share: Tensor | None = None) -> Tensor:
        """What enters the first block, (B, L, E), of tokens (B, L) at positions (L,) or (B, L)."""
        x = self.embedding(tokens)
        if self.spec.mask_scaling:
            x = _scaled(x, tokens == self.mask_token, padding, share)
        if self.positions is not None:
            if padding is not None:  # it may reach beyond the last position, where slices are padded to equal lengths
                positions = positions.where(padding, 0)
            # In a compiled program the lookup itself fails, and who captures a graph has looked.
            captured = positions.is_cuda and torch.cuda.is_current_stream_capturing()
            reads = not torch.compiler.is_compiling() and not captured
            if reads and positions.numel():
                self.check_position(int(positions.max()))
            x = x + self.positions(positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x)

    def _rotary(self, positions: Tensor) -> Tensor | None:
        """Of positions (L,), the same in all rows, or (B, L); None where positions are learned."""
        if self.positions is not None:
            return None
        table = rotary_table(positions, self.spec.head_dim, self.spec.rotary_base)
        return table if positions.ndim == 1 else table.unsqueeze(2)  # a dimension for the heads

    def _initialise(self) -> None:
        # GPT-2's scheme: 0.02, and residual branches shrunk so that the sum over the depth keeps its variance.
        for name, parameter in self.named_parameters():
            if ".attention.gate." in name:  # forget gates begin as rates of decay
                continue
            if parameter.ndim == 2:
                shrink = (
                    math.sqrt(2 * self.spec.depth) if name.endswith(("attention.out.weight", "mlp.2.weight")) else 1
                )
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def _note(states: list[Tensor] | None, x: Tensor) -> Tensor:
    """x, which is kept if somebody wants hidden states."""
    if states is not None:
        states.append(x)
    return x


def _scaled(x: Tensor, masked: Tensor, padding: Tensor | None, share: Tensor | None) -> Tensor:
    """ESM's "token dropout" (Rives et al. 2021; Lin et al. 2023, ESM-2): masked tokens embed as 0, and all others are
    scaled as dropout at 12 %, the share of MASK in ESM's training, would scale them, relative to the share here."""
    if share is None:
        real = torch.ones_like(masked) if padding is None else padding
        share = (masked & real).sum(1) / real.sum(1).clamp(min=1)
    scale = (1 - 0.15 * 0.8) / (1 - share).clamp(min=1e-6)
    return (x.masked_fill(masked[..., None], 0.0) * scale[:, None, None]).to(x.dtype)
