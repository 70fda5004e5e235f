"""Several sources as one: samples of each as often as its weight says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from longseq_data.vocabulary import IGNORE, Vocabulary

from .draw import Draw
from .infilling import Infilling, Pieces
from .rank_share import MakeBatch, Samples, Share, Taker, even
from .rows import Arrays, Finish, Integers, Planned, Rows, Taken


@dataclass(frozen=True)
class MixtureSpec:
    """See streaming.StreamSpec. Sample n is one of some part, as ``draw`` says, and each part goes on where it was.

    An evaluation takes one part after the other, all of each or ``max_samples`` of each; its batches say which part is
    theirs: "part", () int64.
    """

    names: tuple[str, ...]
    parts: tuple[Samples, ...]  # of one vocabulary, length and objective, with or without segments
    draw: Draw
    seed: int  # of masks
    reset: bool = False

    @property
    def vocabulary(self) -> Vocabulary:
        return self.parts[0].vocabulary

    @property
    def objective(self) -> str:
        return self.parts[0].objective

    @property
    def length(self) -> int:
        return self.parts[0].length

    @property
    def fim_rate(self) -> float | None:
        return self.parts[0].fim_rate

    @property
    def split(self) -> str | None:
        return self.parts[0].split

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(source for part in self.parts for source in part.sources)

    @property
    def epoch_samples(self) -> None:
        """Each part has its own."""
        return None

    def epochs(self, samples: int) -> dict[str, float]:
        """See rank_share.Samples."""
        sizes = [part.epoch_samples for part in self.parts]
        counted = zip(self.names, self.draw.counts(samples), sizes, strict=True)
        return {name: count / size for name, count, size in counted if size}

    def begin(self) -> None:
        for part in self.parts:
            part.begin()

    def measuring(self) -> MixtureSpec:
        return replace(self, parts=tuple(part.measuring() for part in self.parts))

    def infilling(self) -> MixtureSpec:
        return replace(self, parts=tuple(part.infilling() for part in self.parts))

    def training(self, start: int, share: Share, warn: bool = False) -> Iterator[MakeBatch]:
        """See rank_share.Samples."""
        tokens, length = self.vocabulary, self.length
        infilling = Infilling.of(self.fim_rate, False, self.seed, tokens, length, training=True)
        finish = Finish(self.objective, self.seed, tokens, self.reset, infilling)
        return even(self.taker(start, warn), finish, start, share)

    def taker(self, start: int, warn: bool = False) -> Taker:
        begun = self.draw.counts(start)
        takers = [part.taker(count, warn) for part, count in zip(self.parts, begun, strict=True)]
        return _Taker(self.draw, takers, start, begun, self.vocabulary)

    def evaluation(self, share: Share, max_samples: int | None = None) -> Iterator[MakeBatch]:
        for number, part in enumerate(self.parts):
            for make in part.evaluation(share, max_samples):
                yield partial(_of_part, make, number)

    def target_counts(self, max_targets: int | None = None) -> npt.NDArray[np.int64]:
        most = None if max_targets is None else -(-max_targets // len(self.parts))
        return np.sum([part.target_counts(most) for part in self.parts], axis=0)


_RAGGED = ("heads", "plain", "tails")


def _of_part(make: MakeBatch, part: int) -> Arrays:
    return {**make(), "part": np.array(part, dtype=np.int64)}


class _Taker:
    def __init__(self, draw: Draw, parts: list[Taker], start: int, begun: list[int], vocabulary: Vocabulary) -> None:
        self._draw, self._parts, self._at, self._begun = draw, parts, start, begun
        self._vocabulary = vocabulary
        self.ahead = min(part.ahead for part in parts)

    def take(self, numbers: Integers, until: int) -> Taken:
        """See sharing.Taker."""
        of = self._draw.sources(self._at, until)
        mine = numbers - self._at
        places, scored = np.empty_like(numbers), np.empty_like(numbers)
        taken: list[Taken | None] = [None] * len(self._parts)
        for number, part in enumerate(self._parts):
            here = of == number
            first, count = self._begun[number], int(np.count_nonzero(here))
            own = np.flatnonzero(here[mine])
            if count:
                taken[number] = some = part.take(first + np.cumsum(here)[mine[own]] - 1, first + count)
                places[own], scored[own] = np.arange(len(own)), some.scored
            self._begun[number] += count
        self._at = until
        return _Mixed(numbers, of[mine], places, scored, taken, self._vocabulary)


@dataclass(frozen=True)
class _Mixed(Planned):
    PER_SAMPLE = ("numbers", "of", "places", "scored")
    numbers: Integers
    of: Integers  # the part of each sample
    places: Integers  # in what was taken of its part
    scored: Integers
    taken: list[Taken | None]  # of each part
    vocabulary: Vocabulary

    def _parts(self) -> list[tuple[Integers, Taken]]:
        """Of each part that has samples here: their places, and what was taken."""
        found = []
        for part, some in enumerate(self.taken):
            here = np.flatnonzero(self.of == part)
            if some is not None and len(here):
                found.append((here, some[self.places[here]]))
        return found

    def pieces(self) -> Pieces:
        made = [some.pieces() for _, some in self._parts()]
        order = np.argsort(np.argsort(self.of, kind="stable"))
        counts = np.concatenate([each.counts for each in made])
        ends = np.cumsum(counts)
        at = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in order.tolist()])
        return Pieces(counts[order], *(np.concatenate([getattr(each, n) for each in made])[at] for n in _RAGGED))

    def rows(self) -> Rows:
        parts = self._parts()
        made = [some.rows() for _, some in parts]
        if len(parts) == 1:
            return made[0]
        shape = len(self), max(tokens.shape[1] for tokens, _ in made)
        rows = np.full(shape, IGNORE, dtype=self.vocabulary.target_dtype)
        documents = np.full(shape, -1, dtype=np.int32)
        for (here, _), (tokens, segments) in zip(parts, made, strict=True):
            rows[here, : tokens.shape[1]] = tokens
            if segments is not None:
                documents[here, : tokens.shape[1]] = segments
        return rows, None if made[0][1] is None else documents
