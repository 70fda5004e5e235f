"""Relatives that a causal model reads before what it scores or draws: a family in its context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from longseq.errors import LongseqError
from longseq.evaluation.records import records
from longseq.trained_model import Source
from longseq_data.randomness import generator
from longseq_data.readers.fasta import read_records
from longseq_data.vocabulary import ALPHABETS, UNKNOWN, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from longseq.models.performer import PerformerLM

_GAPS = str.maketrans("", "", "-.")  # of alignments (A2M, A3M): what is left is the relative itself


class Asked(NamedTuple):
    """What ``longseq score`` and ``sample`` are told about a context."""

    file: str | None = None
    tokens: int = 0
    orders: int = 1

    def check(self, source: Source) -> None:
        """Raises LongseqError for what does not fit together."""
        if self.file is None:
            if self.tokens or self.orders != 1:
                raise LongseqError("context_tokens and context_orders are about a context: name its file, too.")
            return
        source.require("causal", "a context is what comes before, and a masked model reads both sides.")
        if self.tokens < 0 or self.orders < 1:
            raise LongseqError(
                f"context_tokens={self.tokens}, context_orders={self.orders}: take 0 or more, and 1 or more."
            )


def contexts(source: Source, asked: Asked, seed: int = 0) -> list[Tokens]:
    """The rows that sequences are read after: BOS relative EOS relative EOS ..., one for each order.

    Args:
        asked: with a file, FASTA or an alignment of relatives (A3M), whose gaps are left out; ``tokens``: as many
            relatives as fit into these, drawn anew for each order; 0: into the ``data.length`` of the training.
        seed: what orders are drawn from.

    Raises:
        LongseqError, DataError: for a file that cannot be read, and relatives that are all longer than the context.
    """
    relatives = list(_relatives(source, str(asked.file)))
    if not relatives:
        raise LongseqError(f"{asked.file}: no relative has a residue; give some.")
    room = asked.tokens or source.config.data.length
    found = []
    for order in range(asked.orders):
        pieces = [np.array([source.begins], dtype=source.vocabulary.dtype)]
        size = 1
        for place in np.argsort(generator(seed, "context", order).random(len(relatives)), kind="stable").tolist():
            if size + len(relatives[place]) <= room:
                pieces.append(relatives[place])
                size += len(relatives[place])
        if size == 1:
            shortest = min(map(len, relatives))
            raise LongseqError(
                f"{asked.file}: the shortest relative takes {shortest:,} tokens, and the context has {room:,}: give "
                f"it {shortest + 1:,} or more (--context-tokens)."
            )
        found.append(np.concatenate(pieces))
    return found


def _relatives(source: Source, file: str) -> Iterator[Tokens]:
    """Of each its ordinary tokens and EOS; letters outside the alphabet are read as X."""
    alphabet = ALPHABETS.get(source.vocabulary.name)
    if alphabet is None:
        yield from (record.row[1:] for record in records(source, file))
        return
    for record in read_records(file):
        letters = record.sequence.translate(_GAPS)
        if letters:
            ids = np.frombuffer(letters.encode("ascii", "replace").translate(alphabet.table), dtype=np.uint8)
            known = np.where(ids == UNKNOWN, alphabet.letters.index(alphabet.other), ids)
            yield np.append(known, source.vocabulary.eos).astype(source.vocabulary.dtype)


class Read:
    """A context that a model has read: rows are scored as if it came before them."""

    def __init__(self, model: PerformerLM, row: Tokens) -> None:
        from longseq.models.tile_by_tile import carried

        self.model, self.row = model, row
        self.state: tuple[Tensor, ...] | None = None
        if model.spec.carries:
            for _, x, self.state in carried(model, row):
                self.last = x[:, -1:]

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads where each of (B, L) tokens is predicted, (B, L, E). Padding may follow."""
        import torch

        device = self.model.embedding.weight.device
        tokens = tokens.to(device)
        if self.state is None:
            before = torch.from_numpy(self.row.astype(np.int64)).to(device).expand(len(tokens), -1)
            return self.model.hidden(torch.cat([before, tokens[:, :-1]], 1))[:, -tokens.shape[1] :]
        pieces = [self.last.expand(len(tokens), -1, -1)]
        state = tuple(part.repeat(len(tokens), *[1] * (part.dim() - 1)) for part in self.state)
        for start in range(0, tokens.shape[1] - 1, self.model.spec.tile):
            tile = tokens[:, start : min(start + self.model.spec.tile, tokens.shape[1] - 1)]
            x, state = self.model.carry(tile, len(self.row) + start, state, wide=True)
            pieces.append(x)
        return torch.cat(pieces, 1)


def read(model: PerformerLM, rows: Sequence[Tokens]) -> list[Read]:
    import torch

    with torch.inference_mode():
        return [Read(model, row) for row in rows]


def path_of(file: str | Path | None) -> str | None:
    return None if file is None else str(file)
