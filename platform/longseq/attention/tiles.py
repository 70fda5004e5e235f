"""Long sequences in tiles: what a tile needs for its gradient is computed again, tile by tile, in the backward pass.

:func:`pointwise` is for maps that treat every position alike: norms, projections, MLPs. :func:`recurrence` is for what
goes through the sequence once with a state of fixed size, as all of a causal FAVOR+ model does: of the whole sequence
it keeps the state before each tile, and nothing else.

Both return each parameter's gradient once, summed over the tiles in fp32. (A checkpoint around every tile would hand
every parameter a gradient a tile, which DDP and ZeRO take for as many backward passes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longseq.attention.first_order import Saved, first_order

Parameters = Sequence[Tensor]
State = tuple[Tensor, ...]
# (start, stop, the state before) to (what is summed over the tiles, the state behind)
Piece = Callable[[int, int, State], tuple[tuple[Tensor, ...], State]]


def tiles(length: int, tile: int) -> list[tuple[int, int]]:
    """(start, stop) of each tile; the last may be shorter."""
    return [(start, min(start + tile, length)) for start in range(0, length, tile)]


def pointwise(
    function: Callable[..., tuple[Tensor, ...]],
    tile: int,
    inputs: Sequence[Tensor],
    parameters: Parameters,
    *,
    random: bool = False,
) -> tuple[Tensor, ...]:
    """``function(*inputs)``, a tile of positions at a time; kept for the gradient are the inputs.

    Args:
        function: tensors (..., T, ·) to a tuple of tensors (..., T, ·), each position by itself.
        tile: positions at a time.
        inputs: (..., L, ·); the positions are the last axis but one.
        parameters: all other tensors that ``function`` uses and that may want a gradient.
        random: it draws random numbers (dropout), which have to come again.
    """
    learned = [p for p in parameters if p.requires_grad]
    made: tuple[Tensor, ...] = _Pointwise.apply(function, tile, random, len(inputs), *inputs, *learned)
    return made


def recurrence(
    piece: Piece, length: int, tile: int, parameters: Parameters, *, device: torch.device, random: bool = False
) -> tuple[Tensor, ...]:
    """Sums over the tiles of a sequence, each tile starting from the state that the one before has left.

    Args:
        piece: see :data:`Piece`. The first tile is given the empty tuple. A tensor of a state gets a gradient if what
            ``piece`` returned of it wants one; the first sum is what is differentiated.
        length: of the sequence.
        tile: positions at a time.
        parameters: all tensors that ``piece`` uses and that may want a gradient.
        device: where it computes.
        random: it draws random numbers (dropout), which have to come again.

    Returns:
        The sums, the first one in float64 rounded to fp32 at the end.
    """
    learned = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []  # none: no state is kept
    made: tuple[Tensor, ...] = _Recurrence.apply(piece, tiles(length, tile), device, random, *learned)
    return made


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., tuple[Tensor, ...]],
        tile: int,
        random: bool,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs, parameters = tensors[:count], tensors[count:]
        length = inputs[0].shape[-2]
        ctx.replay, ctx.tiles = _Replay(inputs[0].device, random), tiles(length, tile)
        ctx.function, ctx.parameters = function, parameters
        whole: tuple[Tensor, ...] = ()
        for start, stop in ctx.tiles:
            ctx.replay.note()
            parts = function(*(x[..., start:stop, :] for x in inputs))
            whole = whole or tuple(p.new_empty(*p.shape[:-2], length, p.shape[-1]) for p in parts)
            for to, part in zip(whole, parts, strict=True):
                to[..., start:stop, :] = part
        ctx.save_for_backward(*inputs)
        return whole

    @staticmethod
    @first_order
    def backward(ctx: Any, inputs: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[4 : 4 + len(inputs)]
        d_inputs = [torch.empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
        sums = _Sums(ctx.parameters)
        for number, (start, stop) in enumerate(ctx.tiles):
            with ctx.replay.again(number):
                parts = [x[..., start:stop, :].detach() for x in inputs]
                asked = [x.requires_grad_() for x, want in zip(parts, wanted, strict=True) if want]
                outputs = ctx.function(*parts)
            found = torch.autograd.grad(
                outputs, (*asked, *ctx.parameters), [g[..., start:stop, :] for g in grads], allow_unused=True
            )
            targets = (x for x in d_inputs if x is not None)
            for to, grad in zip(targets, found[: len(asked)], strict=True):
                to[..., start:stop, :] = 0.0 if grad is None else grad
            sums.add(found[len(asked) :])
        return None, None, None, None, *d_inputs, *sums.gradients()


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, piece: Piece, cuts: list[tuple[int, int]], device: torch.device, random: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.piece, ctx.cuts, ctx.parameters, ctx.sizes = piece, cuts, parameters, []
        ctx.replay = _Replay(device, random)
        state: State = ()
        states: list[Tensor] = []
        totals: list[Tensor] = []
        for start, stop in cuts:
            ctx.replay.note()
            if parameters:
                states += state
                ctx.sizes.append(len(state))
            sums, state = piece(start, stop, state)
            sums = (sums[0].double(), *sums[1:])
            totals = [total + part for total, part in zip(totals, sums, strict=True)] if totals else list(sums)
        ctx.save_for_backward(*states)
        ctx.mark_non_differentiable(*totals[1:])
        return totals[0].float(), *totals[1:]

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Saved, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        sums = _Sums(ctx.parameters)
        later: list[Tensor | None] = []  # gradients of the state behind the tile
        states = list(saved)
        for number in reversed(range(len(ctx.cuts))):
            size = ctx.sizes[number]
            state, states = states[len(states) - size :], states[: len(states) - size]
            with ctx.replay.again(number):
                before = [x.detach().requires_grad_(x.is_floating_point()) for x in state]
                parts, behind = ctx.piece(*ctx.cuts[number], tuple(before))
            outputs, d_outputs = [parts[0]], [grad.to(parts[0].dtype)]
            for x, d_x in zip(behind, later, strict=False):  # nothing is later than the last tile
                if x.requires_grad and d_x is not None:
                    outputs.append(x)
                    d_outputs.append(d_x)
            asked = [x for x in before if x.requires_grad]
            found = torch.autograd.grad(outputs, (*asked, *ctx.parameters), d_outputs, allow_unused=True)
            given = iter(found[: len(asked)])
            later = [next(given) if x.requires_grad else None for x in before]
            sums.add(found[len(asked) :])
        return None, None, None, None, *sums.gradients()


class _Sums:
    """Gradients of parameters, summed in fp32 (float64 for float64): half precision would lose the later ones."""

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += gradient

    def gradients(self) -> list[Tensor]:
        return [total.to(p.dtype) for total, p in zip(self.sums, self.parameters, strict=True)]


class _Replay:
    """Autocast and random numbers as they were in the forward pass."""

    def __init__(self, device: torch.device, random: bool):
        self.device, self.random = device, random
        kind = device.type
        self.autocast, self.dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.seen: list[tuple[Tensor, Tensor | None]] = []  # the generators before each tile

    def note(self) -> None:
        if self.random:
            self.seen.append(_generators(self.device))

    @contextmanager
    def again(self, number: int) -> Iterator[None]:
        """Compute tile ``number`` again, with gradients."""
        now = _generators(self.device) if self.random else None
        if now is not None:
            _set_generators(self.device, self.seen[number])
        try:
            with torch.enable_grad(), torch.autocast(self.device.type, self.dtype, self.autocast):
                yield
        finally:
            if now is not None:
                _set_generators(self.device, now)


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generators(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
