"""Sequences of any length through a model, a tile at a time.

Causal models carry every layer's attention state from tile to tile: nothing grows with the length. Bidirectional ones
go layer by layer: each layer's sums over all keys are complete before a query reads them, and between two layers the
(L, E) activations of one are in a file in $TMPDIR. What has no sums to carry (exact attention, features of both signs,
and bidirectional layers with a window, a decay, a convolution or scaled masks) is read in one piece, layer by layer,
which takes memory that grows with the length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longseq.attention.carried import State
from longseq.attention.state import AttentionState
from longseq.attention.tiles import tiles
from longseq.errors import LongseqError, place_of_errors
from longseq.measure.peaks import available
from longseq.models.layers import Block
from longseq.models.performer import PerformerLM

_AT_ONCE = 7  # of the size (L, E): what a layer in one piece holds at its most: x, q, k, v, results, and copies of two


def hidden_in_tiles(
    model: PerformerLM, row: npt.NDArray[np.integer], *, layer: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """What the head reads of one sequence, its first positions first.

    Args:
        model: in evaluation mode, as ``Source.load`` gives it, which sets its tile.
        row: (L,) token ids, no padding among them.
        layer: 0: the embedding alone, k: what block k gives; None: what the head reads.

    Yields:
        Where a tile begins, and (1, T, E) on the model's device. A sequence of one tile is read as it always was.

    Raises:
        LongseqError: for a sequence that must be read in one piece and does not fit into memory.
    """
    spec = model.spec
    if not 0 < spec.tile < len(row):
        yield 0, model.hidden(_ids(model, row), layer=layer)
    elif layer == 0:
        for start, stop in tiles(len(row), spec.tile):
            yield start, model.hidden(_ids(model, row[start:stop]), layer=0)
    elif spec.carries:
        yield from ((start, x) for start, x, _ in carried(model, row, layer=layer))
    elif spec.sums_up:
        yield from _layer_by_layer(model, row, layer)
    else:
        _refuse_what_does_not_fit(model, len(row))
        yield 0, model.hidden(_ids(model, row), layer=layer)


def carried(
    model: PerformerLM, row: npt.NDArray[np.integer], *, layer: int | None = None
) -> Iterator[tuple[int, Tensor, State]]:
    """As :func:`hidden_in_tiles`, of a model that ``spec.carries``, with the state behind each tile."""
    state: State = ()
    for start, stop in tiles(len(row), model.spec.tile):
        x, state = model.carry(_ids(model, row[start:stop]), start, state, wide=True, layer=layer)
        yield start, x, state


def _layer_by_layer(
    model: PerformerLM, row: npt.NDArray[np.integer], layer: int | None
) -> Iterator[tuple[int, Tensor]]:
    """Of a model that ``spec.sums_up``. While one layer gives a tile, the next one's keys there are summed up."""
    cuts = tiles(len(row), model.spec.tile)
    blocks = list(islice(model.blocks, layer))
    with _Stored(model) as x, _Stored(model) as values:
        rotary, total = None, None
        for start, stop in cuts:
            tile, rotary = model.entering(_ids(model, row[start:stop]), start)
            total = _added(total, blocks[0], tile, rotary, [])
            x.write(start, tile)
        for number, block in enumerate(blocks):
            assert isinstance(block, Block)
            assert total is not None
            sums, total = total, None
            for start, stop in cuts:
                rotary = model.rotary(start, stop)
                first = [values.read(start, stop, model.spec.heads)] if number and model.spec.value_residual else []
                tile, *handed = block.read_sums(x.read(start, stop), sums, rotary, *first)
                if number == 0 and handed:
                    values.write(start, handed[0].transpose(1, 2).flatten(2))
                if number + 1 < len(blocks):
                    total = _added(total, blocks[number + 1], tile, rotary, handed)
                    x.write(start, tile)
                else:
                    yield start, tile if layer is not None else model.norm(tile)


def _added(
    total: AttentionState | None, block: torch.nn.Module, tile: Tensor, rotary: Tensor | None, first: list[Tensor]
) -> AttentionState:
    assert isinstance(block, Block)
    own = block.sum_up(tile, rotary, *first)
    return own if total is None else total.merge(own)


class _Stored:
    """(L, E) activations in a file that has no name and is gone with this object."""

    def __init__(self, model: PerformerLM):
        weight = model.embedding.weight
        self.width, self.dtype, self.device = model.spec.dim, weight.dtype, weight.device
        self.size = self.width * weight.element_size()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object

    def __enter__(self) -> _Stored:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def write(self, start: int, x: Tensor) -> None:
        """x (1, T, E)."""
        content = x.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with place_of_errors(Path(tempfile.gettempdir())):
            self.file.seek(start * self.size)
            self.file.write(content.data)
            self.file.flush()

    def read(self, start: int, stop: int, heads: int = 0) -> Tensor:
        """(1, T, E), or by heads (1, H, T, E / H)."""
        content = bytearray((stop - start) * self.size)
        self.file.seek(start * self.size)
        self.file.readinto(content)
        x = torch.frombuffer(content, dtype=self.dtype).view(1, stop - start, self.width).to(self.device)
        return x.unflatten(2, (heads, -1)).transpose(1, 2) if heads else x


def _refuse_what_does_not_fit(model: PerformerLM, length: int) -> None:
    weight, spec = model.embedding.weight, model.spec
    needed, free = _AT_ONCE * length * spec.dim * weight.element_size(), available(weight.device)
    if needed > free:
        what = "exact attention" if spec.kind == "exact" else "this model's attention"
        raise LongseqError(
            f"a sequence of {length:,} tokens in one piece takes about {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free: {what} has no sums to carry from tile to tile; give shorter sequences, "
            "or take a machine with more memory."
        )


def _ids(model: PerformerLM, row: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(row.astype(np.int64))[None].to(model.embedding.weight.device)
