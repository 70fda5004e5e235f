"""What a model says of documents, by a plain loop: one document, or window of it, at a time, not padded or packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from longseq_data.randomness import words
from longseq_data.samples.masking import mask_tokens
from longseq_data.vocabulary import IGNORE, Vocabulary
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
    """What ``longseq evaluate`` must find of a split, or of one of its sources: split/NAME."""
    found = Scores()
    split, _, only = split.partition("/")
    begin = 0
    for part, (name, count) in enumerate(source.parts.get(split, {"": len(source.documents[split])}).items()):
        documents = source.documents[split][begin : begin + count]
        begin += count
        own = bool(name) and split == "train"  # an order, and masks, of its own
        of_part = int(words(seed, "source", part)[0] >> np.uint64(1)) if own else seed
        if only in ("", name):
            _score(found, model, vocabulary, way, source, documents, of_part)
    return found


def _score(
    found: Scores,
    model: nn.Module,
    vocabulary: Vocabulary,
    way: Way,
    source: Source,
    documents: list[list[int]],
    seed: int,
) -> None:
    number = 0
    for window in windows(way, source, documents):
        if way["objective"] == "causal":
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


def windows(way: Way, source: Source, documents: list[list[int]]) -> Iterator[list[list[int]]]:
    """The sequences of an evaluation, each as the pieces of it that see each other."""
    special = source.special
    causal = way["objective"] == "causal"
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
    if way["packing"] == "concat":
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
def log_likelihood(model: nn.Module, way: Way, source: Source, document: list[int], ended: bool = True) -> float:
    """What ``longseq score`` must find, nats: of the tokens and the end; masked: of each token hidden alone."""
    row = [begins(way, source), *document, source.special.eos]
    if way["objective"] == "causal":
        said = model(torch.tensor([row[:-1]]))[0].double().log_softmax(-1)
        return sum(float(said[i, token]) for i, token in enumerate(row[1:] if ended else row[1:-1]))
    total = 0.0
    for place in range(1, len(row) - 1):
        hidden = [source.special.mask if i == place else token for i, token in enumerate(row)]
        total += float(model(torch.tensor([hidden]))[0, place].double().log_softmax(-1)[row[place]])
    return total


@torch.no_grad()
def vector(model: nn.Module, way: Way, source: Source, document: list[int]) -> np.ndarray:
    """What ``longseq embed`` must find: the mean of what the head reads of the document's own tokens."""
    row = [begins(way, source), *document, source.special.eos]
    return model.hidden(torch.tensor([row]))[0, 1:-1].double().mean(0).numpy()


def begins(way: Way, source: Source) -> int:
    """The token before a record: where records were joined the end of another."""
    joined = way["packing"] == "concat" and way["reset"] == "through"
    return source.special.eos if joined else source.special.bos
