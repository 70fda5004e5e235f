"""Sequences of any length, read by a trained model in tiles where it can, in one piece where that fits into memory.

Exact attention has no sums to carry: a model with a layer of it goes in one piece, layer by layer, which takes memory
that grows with the length.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from longseq.errors import LongseqError
from longseq.measure.peaks import available
from longseq.models.performer import PerformerLM
from longseq.models.tile_by_tile import Row, carried, ids, layer_by_layer

_AT_ONCE = 7  # of the size (L, E): what a layer in one piece holds at its most: x, q, k, v, results, and copies of two


def hidden_in_tiles(model: PerformerLM, row: Row, *, layer: int | None = None) -> Iterator[tuple[int, Tensor]]:
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
        yield 0, model.hidden(ids(model, row[:]), layer=layer)
    elif layer == 0:
        for start in range(0, len(row), spec.tile):
            yield start, model.hidden(ids(model, row[start : start + spec.tile]), layer=0)
    elif spec.reads_on:
        yield from ((start, x) for start, x, _ in carried(model, row, layer=layer))
    elif spec.sums_up:
        yield from layer_by_layer(model, row, layer)
    else:
        _refuse_what_does_not_fit(model, len(row))
        yield 0, model.hidden(ids(model, row[:]), layer=layer)


def _refuse_what_does_not_fit(model: PerformerLM, length: int) -> None:
    weight, spec = model.embedding.weight, model.spec
    numbers = _AT_ONCE * length * spec.dim
    if any(options.kind == "exact" and options.learned_decay for options in spec.plan):
        numbers += spec.heads * length**2  # a decay is a table of all scores
    needed, free = numbers * weight.element_size(), available(weight.device)
    if needed > free:
        raise LongseqError(
            f"a sequence of {length:,} tokens in one piece takes about {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free: exact attention has no sums to carry from tile to tile; give shorter "
            "sequences, or take a machine with more memory."
        )
