"""Relatives that a causal model reads before what it scores or draws: a family in its context."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from longseq.errors import LongseqError
from longseq.evaluation.records import records
from longseq.trained_model import Source
from longseq_data.randomness import generator
from longseq_data.readers.fasta import Record, parse_records
from longseq_data.readers.sources import open_text
from longseq_data.vocabulary import ALPHABETS, UNKNOWN, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from longseq.models.performer import PerformerLM
    from longseq.models.spec import PerformerSpec

_GAPS = str.maketrans("", "", "-.")  # of alignments (A2M, A3M): what is left is the relative itself
_LOOKED_AT = 100_000  # records of a file that may be relatives, too
_NO_SEQUENCES = ("ss_pred", "ss_conf", "ss_dssp")  # what HH-suite puts into an A3M as records


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


def contexts(source: Source, asked: Asked, seed: int = 0, *, say: bool = False) -> list[Tokens]:
    """The rows that sequences are read after: BOS relative EOS relative EOS ..., one for each order; or none.

    Args:
        asked: with a file, FASTA or an alignment of relatives (A3M), whose gaps are left out; ``tokens``: as many
            relatives as fit into these, drawn anew for each order; 0: into three quarters of the training's
            ``data.length``, so that what follows lies within it, too.
        seed: what orders are drawn from.
        say: how many relatives are read, and which letters of theirs as X, on stderr.

    Raises:
        LongseqError, DataError: for a file that cannot be read, and relatives that are all longer than the context.
    """
    if asked.file is None:
        return []
    unknown: Counter[str] = Counter()
    relatives = list(_relatives(source, asked.file, unknown))
    if not relatives:
        raise LongseqError(f"{asked.file}: no relative has a residue; give some.")
    room = asked.tokens or source.config.data.length * 3 // 4
    found, fitting = [], []
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
        fitting.append(len(pieces) - 1)
    if say:
        read = f"{min(fitting):,}" if min(fitting) == max(fitting) else f"{min(fitting):,} to {max(fitting):,}"
        print(f"{asked.file}: {read} of {len(relatives):,} relatives, in {room:,} tokens at most", file=sys.stderr)
        if unknown:
            letters = ", ".join(f"{letter!r} × {count:,}" for letter, count in unknown.most_common(5))
            other = ALPHABETS[source.vocabulary.name].other
            print(f"longseq: warning: {asked.file}: letters are read as {other}: {letters}", file=sys.stderr)
    return found


def say_known(source: Source, file: str, context: str) -> None:
    """Warn where records to be scored are relatives, too: a model that has read a sequence knows it."""
    known = {row.tobytes() for row in _relatives(source, context, Counter())}
    number = sum(record.row[1:].tobytes() in known for record in islice(records(source, file), _LOOKED_AT))
    if number:
        print(
            f"longseq: warning: {file}: {number:,} of its sequences are in {context}, too, and have then been read "
            "before they are scored",
            file=sys.stderr,
        )


def _relatives(source: Source, file: str, unknown: Counter[str]) -> Iterator[Tokens]:
    """Of each its ordinary tokens and EOS; letters outside the alphabet are read as X, and counted."""
    alphabet = ALPHABETS.get(source.vocabulary.name)
    if alphabet is None:
        yield from (record.row[1:] for record in records(source, file))
        return
    for record in _alignment(file):
        if record.identifier in _NO_SEQUENCES:
            continue
        letters = record.sequence.translate(_GAPS)
        if letters:
            ids = np.frombuffer(letters.encode("ascii", "replace").translate(alphabet.table), dtype=np.uint8)
            unknown.update(letters[place] for place in np.flatnonzero(ids == UNKNOWN))
            known = np.where(ids == UNKNOWN, alphabet.letters.index(alphabet.other), ids)
            yield np.append(known, source.vocabulary.eos).astype(source.vocabulary.dtype)


def _alignment(file: str) -> Iterator[Record]:
    """The records of FASTA or A3M, whose first lines may begin with '#' (ColabFold, HH-suite)."""
    begun = False

    def lines(handle: Iterable[str]) -> Iterator[str]:
        nonlocal begun
        for line in handle:
            begun = begun or line.startswith(">")
            yield "\n" if line.startswith("#") and not begun else line

    with open_text(file) as handle:
        yield from parse_records(lines(handle), file)


def again(spec: PerformerSpec, length: int) -> bool:
    """Whether a context of so many tokens is read again with each sequence, as no state can stand for it."""
    sums = all(options.kind == "favor" for options in spec.plan)
    return not sums or length < max(options.window for options in spec.plan)


class Read:
    """A context that a model has read: rows are scored as if it came before them."""

    def __init__(self, model: PerformerLM, row: Tokens) -> None:
        from longseq.models.tile_by_tile import carried

        self.model, self.row = model, row
        self.state: tuple[Tensor, ...] | None = None
        spec = model.spec
        if spec.reads_on and not again(spec, len(row)):
            for _, x, self.state in carried(model, row, more=True):
                self.last = x[:, -1:]

    def hidden(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What the head reads where each of (B, L) tokens is predicted: places from where on, (B, T, E). Padding may
        follow."""
        import torch

        device = self.model.embedding.weight.device
        tokens = tokens.to(device)
        if self.state is None:
            before = torch.from_numpy(self.row.astype(np.int64)).to(device).expand(len(tokens), -1)
            yield 0, self.model.hidden(torch.cat([before, tokens[:, :-1]], 1))[:, -tokens.shape[1] :]
            return
        yield 0, self.last.expand(len(tokens), -1, -1)
        state = tuple(part.repeat(len(tokens), *[1] * (part.dim() - 1)) for part in self.state)
        length, tile = tokens.shape[1] - 1, self.model.spec.tile
        for start in range(0, length, tile):
            x, state = self.model.carry(
                tokens[:, start : min(start + tile, length)], len(self.row) + start, state, wide=True
            )
            yield start + 1, x


def read(model: PerformerLM, rows: Sequence[Tokens]) -> list[Read]:
    import torch

    with torch.inference_mode():
        return [Read(model, row) for row in rows]


def path_of(file: str | Path | None) -> str | None:
    return None if file is None else str(file)
