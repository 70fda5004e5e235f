"""One sequence of any length through a trained model, a tile at a time.

Causal models carry every layer's attention state from tile to tile: nothing grows with the length. Bidirectional ones
go layer by layer: each layer's sums over all keys are complete before a query reads them, and between two layers the
(L, E) activations of one are in a file in $TMPDIR. No gradients.
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

    While one layer gives a tile, the next one's keys there are summed up.
    """
    cuts = tiles(len(row), model.spec.tile)
    blocks = list(islice(model.blocks, layer))
    with _Stored(model) as x, _Stored(model) as values:
        rotary, total = None, None
        for start, stop in cuts:
            tile, rotary = model.entering(ids(model, row[start:stop]), start)
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


def ids(model: PerformerLM, row: npt.NDArray[np.integer]) -> Tensor:
    """A row (L,) as a batch of one, (1, L), on the model's device."""
    return torch.from_numpy(row.astype(np.int64))[None].to(model.embedding.weight.device)
