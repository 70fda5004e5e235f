"""What a model says of documents, by a plain loop: one document, or window of it, at a time, not padded or packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from laid_out import plainly
from longseq_data.prepare.held_out import hashes
from longseq_data.randomness import generator, stream_words, words
from longseq_data.samples.masking import mask_tokens
from longseq_data.vocabulary import IGNORE, InfillVocabulary, Vocabulary
from ways.axes import Way
from ways.sources import LENGTH, Source


@dataclass
class Scores:
    """Of all targets of a split."""

    targets: int = 0
    nats: float = 0.0
    right: int = 0
    undecided: int = 0  # the two most probable tokens are equally probable, but for rounding

    @property
    def loss(self) -> float:
        return self.nats / self.targets

    def bits(self, units: int) -> float:
        return self.nats / math.log(2) / units

    def add(self, logits: Tensor, targets: list[int]) -> None:
        """Of one document or window; IGNORE is no target."""
        for row, target in zip(logits.double().log_softmax(-1), targets, strict=True):
            if target == IGNORE:
                continue
            first, second = row.topk(2)[0].tolist()
            self.targets += 1
            self.nats -= float(row[target])
            self.right += int(row.argmax()) == target
            self.undecided += first - second < 1e-5


@torch.no_grad()
def scores(model: nn.Module, vocabulary: Vocabulary, way: Way, source: Source, split: str, seed: int) -> Scores:
    """What ``longseq evaluate`` must find of a split, or of one of its sources: split/NAME, split#infill."""
    found = Scores()
    whole, _, infill = split.partition("#")
    split, _, only = whole.partition("/")
    begin = 0
    for part, (name, count) in enumerate(source.parts.get(split, {"": len(source.documents[split])}).items()):
        documents = source.documents[split][begin : begin + count]
        begin += count
        own = bool(name) and split == "train"  # an order, and masks, of its own
        of_part = int(words(seed, "source", part)[0] >> np.uint64(1)) if own else seed
        if only in ("", name):
            rows = families(source, split) if way["packing"] == "family" else None
            if infill:
                _score_middles(found, model, vocabulary, windows(way, source, documents, rows))
            else:
                _score(found, model, vocabulary, way, source, documents, of_part, rows)
    return found


def _score(
    found: Scores,
    model: nn.Module,
    vocabulary: Vocabulary,
    way: Way,
    source: Source,
    documents: list[list[int]],
    seed: int,
    rows: list[list[int]] | None,
) -> None:
    number = 0
    for window in windows(way, source, documents, rows):
        if way["objective"] != "masked":
            for piece in window:
                if len(piece) > 1:
                    found.add(model(torch.tensor([piece[:-1]]))[0], piece[1:])
            continue
        whole = np.array([token for piece in window for token in piece])
        if not (whole < source.special.ordinary).any():
            continue
        inputs, targets = mask_tokens(whole.astype(vocabulary.dtype), seed, number, vocabulary)
        number += 1
        at = 0
        for piece in window:
            here = slice(at, at + len(piece))
            found.add(model(torch.tensor([inputs[here].tolist()]))[0], targets[here].tolist())
            at += len(piece)


def _score_middles(found: Scores, model: nn.Module, tokens: Vocabulary, every: Iterator[list[list[int]]]) -> None:
    """Every document of every window laid out, and its middle and end scored."""
    assert isinstance(tokens, InfillVocabulary)
    with_targets = (window for window in every if any(len(piece) > 1 for piece in window))
    for number, window in enumerate(with_targets):
        row = plainly([token for piece in window for token in piece], number, 1.0, 0, LENGTH + 1, tokens)
        starts = [0, *(at for at in range(1, len(row)) if len(window) > 1 and row[at] == tokens.bos)]
        for piece in (row[start:stop] for start, stop in zip(starts, [*starts[1:], len(row)], strict=True)):
            targets, inside = [], False
            for token in piece:
                targets.append(token if inside and token < tokens.prefix else IGNORE)
                inside = token == tokens.middle or (inside and token < tokens.prefix and token != tokens.eos)
            if len(piece) > 1:
                found.add(model(torch.tensor([piece[:-1]]))[0], targets[1:])


def families(source: Source, split: str) -> list[list[int]]:
    """BOS member EOS member EOS ... of each cluster, by its hash; members in the order of all evaluations."""
    held: dict[str, list[list[int]]] = {}
    for document, cluster in zip(source.documents[split], source.clusters[split], strict=True):
        held.setdefault(cluster, []).append([*document, source.special.eos])
    rows = []
    for number, name in enumerate(sorted(held, key=lambda name: int(hashes([name])[0]))):
        state = stream_words(words(0, "family", np.array([0])), np.array([number]))
        order = np.argsort(stream_words(state, np.arange(len(held[name]))), kind="stable")
        rows.append([source.special.bos, *(token for member in order for token in held[name][member])])
    return rows


def windows(
    way: Way, source: Source, documents: list[list[int]], rows: list[list[int]] | None = None
) -> Iterator[list[list[int]]]:
    """The sequences of an evaluation, each as the pieces of it that see each other. rows: those of families."""
    special = source.special
    causal = way["objective"] != "masked"
    if way["reset"] == "reset":  # one stream of documents that do not see each other
        rows = [[special.bos, *document, special.eos] for document in documents]
        owners = [owner for owner, row in enumerate(rows) for _ in row]
        tokens = [token for row in rows for token in row]
        for start, stop in _cuts(len(tokens), causal):
            pieces: dict[int, list[int]] = {}
            for place in range(start, stop):
                pieces.setdefault(owners[place], []).append(tokens[place])
            yield list(pieces.values())
        return
    if rows is not None:
        pass
    elif way["packing"] == "concat":
        rows = [[special.eos, *(token for document in documents for token in (*document, special.eos))]]
    else:
        rows = [[special.bos, *document, *[special.eos][: source.closed]] for document in documents]
    for row in rows:
        for start, stop in [*_cuts(len(row), causal)][: 1 if way["crop"] == "first" else None]:
            yield [row[start:stop]]


def _cuts(size: int, causal: bool) -> Iterator[tuple[int, int]]:
    """A causal window needs the token after its last one, as a target."""
    for start in range(0, size - causal, LENGTH):
        yield start, min(size, start + LENGTH + causal)


@torch.no_grad()
def log_likelihood(
    model: nn.Module, way: Way, source: Source, document: list[int], ended: bool = True, before: list[int] | None = None
) -> float:
    """What ``longseq score`` must find, nats: of the tokens and the end; masked: of each token hidden alone.

    before: what is read first, with the token before a record.
    """
    before = before or [begins(way, source)]
    row = [*before, *document, source.special.eos]
    if way["objective"] != "masked":
        said = model(torch.tensor([row[:-1]]))[0].double().log_softmax(-1)
        last = len(row) - (not ended)
        return sum(float(said[place - 1, row[place]]) for place in range(len(before), last))
    total = 0.0
    for place in range(1, len(row) - 1):
        hidden = [source.special.mask if i == place else token for i, token in enumerate(row)]
        total += float(model(torch.tensor([hidden]))[0, place].double().log_softmax(-1)[row[place]])
    return total


def contexts(way: Way, source: Source, room: int, orders: int, seed: int = 0) -> list[list[int]]:
    """The test split's documents as relatives, as many as fit in an order of each draw."""
    found = []
    for turn in range(orders):
        row = [begins(way, source)]
        documents = source.documents["test"]
        for place in np.argsort(generator(seed, "context", turn).random(len(documents)), kind="stable"):
            if len(row) + len(documents[place]) + 1 <= room:
                row += [*documents[place], source.special.eos]
        found.append(row)
    return found


@torch.no_grad()
def vector(model: nn.Module, way: Way, source: Source, document: list[int]) -> np.ndarray:
    """What ``longseq embed`` must find: the mean of what the head reads of the document's own tokens."""
    row = [begins(way, source), *document, source.special.eos]
    return model.hidden(torch.tensor([row]))[0, 1:-1].double().mean(0).numpy()


def begins(way: Way, source: Source) -> int:
    """The token before a record: where records were joined the end of another."""
    joined = way["packing"] == "concat" and way["reset"] == "through"
    return source.special.eos if joined else source.special.bos
