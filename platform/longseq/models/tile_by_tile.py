"""One sequence of any length through a trained model, a tile at a time.

Causal models carry every layer's attention state from tile to tile: nothing grows with the length. Bidirectional ones
go layer by layer: each layer's sums over all keys are complete before a query reads them, and the (L, E) activations
before a layer and behind it are in files in $TMPDIR. No gradients.
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
from longseq.errors import place_of_errors
from longseq.models.layers import Block
from longseq.models.performer import PerformerLM


def carried(
    model: PerformerLM, row: npt.NDArray[np.integer], *, layer: int | None = None, more: bool = False
) -> Iterator[tuple[int, Tensor, State]]:
    """Where each tile begins, what the head reads of it, (1, T, E), and the state behind it.

    Args:
        model: in evaluation mode; it ``spec.carries``.
        row: (L,) token ids, no padding among them.
        layer: k: what block k gives, from 1 on; None: what the head reads.
        more: whether other tokens follow; then the last tile is no shorter than a window, if the row is not.
    """
    state: State = ()
    cuts, window = tiles(len(row), model.spec.tile), max(options.window for options in model.spec.plan)
    if more and len(cuts) > 1 and cuts[-1][1] - cuts[-1][0] < window:
        cuts[-2:] = [(cuts[-2][0], cuts[-1][1])]
    for start, stop in cuts:
        x, state = model.carry(ids(model, row[start:stop]), start, state, wide=True, layer=layer)
        yield start, x, state


def layer_by_layer(model: PerformerLM, row: npt.NDArray[np.integer], layer: int | None) -> Iterator[tuple[int, Tensor]]:
    """The same without the state, of a model that ``spec.sums_up``.

    A convolution reads neighbours of a tile, so what goes into a layer stays until all of it has been read.
    """
    cuts = tiles(len(row), model.spec.tile)
    blocks = [block for block in islice(model.blocks, layer) if isinstance(block, Block)]
    with _Stored(model) as entering, _Stored(model) as leaving, _Stored(model) as values:
        for start, stop in cuts:
            entering.write(start, model.entering(ids(model, row[start:stop]), start)[0])
        for number, block in enumerate(blocks):
            mixed = values if number and model.spec.value_residual else None
            total: AttentionState | None = None
            for _, x, beside, rotary, first in _tiles(model, block, cuts, entering, mixed):
                own = block.sum_up(x, beside, rotary, *first)
                total = own if total is None else total.merge(own)
            assert total is not None
            for start, x, beside, rotary, first in _tiles(model, block, cuts, entering, mixed):
                tile, *handed = block.read_sums(x, beside, total, rotary, *first)
                if number == 0 and handed:
                    values.write(start, handed[0].transpose(1, 2).flatten(2))
                if number + 1 < len(blocks):
                    leaving.write(start, tile)
                else:
                    yield start, tile if layer is not None else model.norm(tile)
            entering, leaving = leaving, entering


def _tiles(
    model: PerformerLM, block: Block, cuts: list[tuple[int, int]], entering: _Stored, values: _Stored | None
) -> Iterator[tuple[int, Tensor, tuple[int, int], Tensor | None, list[Tensor]]]:
    """Of each tile where it begins, what a block reads of it and beside it, how much of that lies before and behind it,
    its rotary table, and the first layer's values there, if ``values`` has them."""
    before, behind = block.attention.reach
    for start, stop in cuts:
        first, last = max(0, start - before), min(cuts[-1][1], stop + behind)
        given = [] if values is None else [values.read(start, stop, model.spec.heads)]
        yield start, entering.read(first, last), (start - first, last - stop), model.rotary(start, stop), given


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


def ids(model: PerformerLM, row: npt.NDArray[np.integer]) -> Tensor:
    """A row (L,) as a batch of one, (1, L), on the model's device."""
    return torch.from_numpy(row.astype(np.int64))[None].to(model.embedding.weight.device)
