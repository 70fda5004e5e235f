"""One sequence of any length through a trained model, a tile at a time.

Causal models carry every layer's attention state from tile to tile: nothing grows with the length. Bidirectional ones
go layer by layer, in two passes each: sums over all keys are complete before a query reads them, or, where weights
depend on where a key is, the states behind each tile. These and the (L, E) activations before a layer and behind it are
in files in $TMPDIR. No gradients.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longseq.allocator import freed_at_once
from longseq.attention.both_ways import attention_on_both_sides, beside, knows_places, state_behind
from longseq.attention.carried import State
from longseq.attention.state import AttentionState
from longseq.attention.summed import attention_to_sums, sum_of_keys
from longseq.attention.tiles import tiles
from longseq.errors import LongseqError
from longseq.models.layers import Block
from longseq.models.performer import PerformerLM
from longseq_data.os_errors import is_full, said

_ELSEWHERE = "make room there, or set TMPDIR to a folder on a larger disk"


class Row(Protocol):
    """(L,) token ids: an array, or what gives its parts."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> npt.NDArray[Any]: ...


def carried(
    model: PerformerLM, row: Row, *, layer: int | None = None, more: bool = False
) -> Iterator[tuple[int, Tensor, State]]:
    """Where each tile begins, what the head reads of it, (1, T, E), and the state behind it.

    Args:
        model: in evaluation mode; it ``spec.reads_on``.
        row: (L,) token ids, no padding among them.
        layer: k: what block k gives, from 1 on; None: what the head reads.
        more: whether other tokens follow; then the last tile is no shorter than a window, if the row is not.
    """
    state: State = ()
    share = masked_share(model, row)
    cuts, window = tiles(len(row), model.spec.tile), max(options.window for options in model.spec.plan)
    if more and len(cuts) > 1 and cuts[-1][1] - cuts[-1][0] < window:
        cuts[-2:] = [(cuts[-2][0], cuts[-1][1])]
    with freed_at_once():
        for start, stop in cuts:
            x, state = model.carry(ids(model, row[start:stop]), start, state, wide=True, layer=layer, share=share)
            yield start, x, state


def layer_by_layer(model: PerformerLM, row: Row, layer: int | None) -> Iterator[tuple[int, Tensor]]:
    """The same without the state, of a model that ``spec.sums_up``.

    A tile is given its neighbours within the reach of windows and convolutions, so what goes into a layer stays until
    all of it has been read.

    Raises:
        LongseqError: before anything is read, where the files would not fit; and where the disk becomes full.
    """
    cuts = tiles(len(row), model.spec.tile)
    blocks = [block for block in islice(model.blocks, layer) if isinstance(block, Block)]
    _look_for_room(model, blocks, cuts)
    share = masked_share(model, row)
    with freed_at_once(), _Stored(model) as entering, _Stored(model) as leaving, _Stored(model) as values:
        for start, stop in cuts:
            entering.write(start, model.entering(ids(model, row[start:stop]), start, share)[0])
        for number, block in enumerate(blocks):
            mixed = values if number and model.spec.value_residual else None
            read = _on_both_sides if knows_places(block.attention.options) else _summed
            for tile, x, *handed in read(block, [_Tile(model, block, cut, len(row), entering, mixed) for cut in cuts]):
                if number == 0 and handed and len(blocks) > 1:
                    own = handed[0][:, :, tile.near[0] : handed[0].shape[2] - tile.near[1]]
                    values.write(tile.start, own.transpose(1, 2).flatten(2))
                if number + 1 < len(blocks):
                    leaving.write(tile.start, x)
                else:
                    yield tile.start, x if layer is not None else model.norm(x)
            entering, leaving = leaving, entering


class _Tile:
    """A tile of a sequence, and what lies beside it in reach of a block's attention; read from files when asked for."""

    def __init__(
        self,
        model: PerformerLM,
        block: Block,
        cut: tuple[int, int],
        length: int,
        entering: _Stored,
        values: _Stored | None,
    ):
        self.model, self.entering, self.values, (self.start, self.stop) = model, entering, values, cut
        before, behind = beside(block.attention.options)
        self.made = max(0, self.start - before), min(length, self.stop + behind)  # where there are queries and keys
        self.near = self.start - self.made[0], self.made[1] - self.stop
        left, right = block.attention.reach
        self.read = max(0, self.made[0] - left), min(length, self.made[1] + right)
        self.own = self.start - self.read[0], self.read[1] - self.stop

    def arguments(self) -> tuple[Any, ...]:
        """As of :meth:`longseq.models.layers.Block.inside`."""
        x = self.entering.read(*self.read)
        first = () if self.values is None else (self.values.read(*self.made, self.model.spec.heads),)
        around = self.made[0] - self.read[0], self.read[1] - self.made[1]
        return x, around, self.model.rotary(*self.made), *first


def _summed(block: Block, row: list[_Tile]) -> Iterator[tuple[Any, ...]]:
    """Each tile with what the block gives there, and values if it hands them on; weights know no places."""
    total: AttentionState | None = None
    for tile in row:
        own = sum_of_keys(*block.inside(*tile.arguments()))
        total = own if total is None else total.merge(own)
    assert total is not None
    attend = partial(attention_to_sums, total)
    for tile in row:
        x, _, *handed = block.read(lambda *inside: (attend(*inside), None), tile.own, *tile.arguments())
        yield tile, x, *handed


def _on_both_sides(block: Block, row: list[_Tile]) -> Iterator[tuple[Any, ...]]:
    """The same of weights that depend on where a key is."""
    before: AttentionState | None = None
    behind: AttentionState | None = None
    with _States(row[0].entering.device) as states:
        for number in range(len(row) - 1, 0, -1):
            behind = state_behind(*block.inside(*row[number].arguments()), row[number].near, behind)
            if behind is None:  # a window alone
                break
            states.write(number - 1, behind)
        for number, tile in enumerate(row):
            behind = states.read(number) if states.shape and number + 1 < len(row) else None
            x, before, *handed = block.read(
                partial(attention_on_both_sides, tile.near, before, behind), tile.own, *tile.arguments()
            )
            yield tile, x, *handed


def _look_for_room(model: PerformerLM, blocks: list[Block], cuts: list[tuple[int, int]]) -> None:
    """Refuse a sequence whose files do not fit into the folder of temporary files."""
    several, spec, length = len(blocks) > 1, model.spec, cuts[-1][1]
    activations = 1 + several * (1 + spec.value_residual)
    needed = activations * length * spec.dim * model.embedding.weight.element_size()
    needed += max((_state_size(block) for block in blocks), default=0) * (len(cuts) - 1)
    folder = _folder()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LongseqError(
            f"{folder}: {free / 2**20:,.0f} MiB free, and a sequence of {length:,} tokens needs {needed / 2**20:,.0f} "
            f"MiB of temporary files there; {_ELSEWHERE}."
        )


def _state_size(block: Block) -> int:
    """Bytes of the state behind a tile, of one sequence; 0 where none is kept."""
    attention, options = block.attention, block.attention.options
    if not knows_places(options) or not options.has_features:
        return 0
    features = attention.head_dim if options.kernel == "relu_direct" else options.features
    return 8 * attention.heads * (features * (attention.head_dim + 1) + 1)


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LongseqError(f"no place for temporary files: {said(error)}; {_ELSEWHERE}.") from None


class _File:
    """Tensors in a file that has no name and is gone with this object."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # of a full disk, which has been said
            self.file.close()

    def put(self, place: int, x: Tensor) -> None:
        content = x.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        try:
            self.file.seek(place)
            self.file.write(content.data)
            self.file.flush()
        except OSError as error:
            if not is_full(error):
                raise OSError(error.errno, error.strerror or str(error), _folder()) from None
            raise LongseqError(
                f"{_folder()}: {said(error)}, after {place / 2**20:,.0f} MiB of a long sequence's temporary file; "
                f"{_ELSEWHERE}."
            ) from None

    def get(self, place: int, size: int) -> Tensor:
        content = bytearray(size)
        self.file.seek(place)
        if self.file.readinto(content) < size:
            raise OSError(f"{tempfile.gettempdir()}: a temporary file has lost what was written to it")
        return torch.frombuffer(content, dtype=self.dtype).to(self.device)


class _Stored(_File):
    """(L, E) activations."""

    def __init__(self, model: PerformerLM):
        weight = model.embedding.weight
        super().__init__(weight.dtype, weight.device)
        self.width, self.size = model.spec.dim, model.spec.dim * weight.element_size()

    def write(self, start: int, x: Tensor) -> None:
        """x (1, T, E)."""
        self.put(start * self.size, x)

    def read(self, start: int, stop: int, heads: int = 0) -> Tensor:
        """(1, T, E), or by heads (1, H, T, E / H)."""
        x = self.get(start * self.size, (stop - start) * self.size).view(1, stop - start, self.width)
        return x.unflatten(2, (heads, -1)).transpose(1, 2) if heads else x


class _States(_File):
    """States by number, all of one shape."""

    def __init__(self, device: torch.device):
        super().__init__(torch.float64, device)
        self.shape = torch.Size()

    def write(self, number: int, state: AttentionState) -> None:
        self.shape = state.sums.shape
        one = torch.cat((state.sums.flatten(1), state.log_scale.flatten(1)), dim=1)
        self.put(number * 8 * one.numel(), one)

    def read(self, number: int) -> AttentionState:
        size = 8 * (self.shape.numel() + self.shape[0])
        one = self.get(number * size, size).view(self.shape[0], -1)
        return AttentionState(one[:, :-1].reshape(self.shape), one[:, -1:, None])


def masked_share(model: PerformerLM, row: Row) -> Tensor | None:
    """The share of MASK in a row, (1,), if the model scales what enters it by that."""
    if not model.spec.mask_scaling:
        return None
    count = sum(int((row[start:stop] == model.mask_token).sum()) for start, stop in tiles(len(row), model.spec.tile))
    return torch.tensor([count], device=model.embedding.weight.device) / len(row)


def ids(model: PerformerLM, row: npt.NDArray[np.integer]) -> Tensor:
    """A row (L,) as a batch of one, (1, L), on the model's device."""
    return torch.from_numpy(row.astype(np.int64))[None].to(model.embedding.weight.device)
