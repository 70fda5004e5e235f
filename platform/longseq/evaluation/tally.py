"""What an evaluation counts, sequence by sequence: put together in one order, whoever counted which part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import IO

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DEPTHS = 12  # numbers of members before: 0, 1, 2 to 3, 4 to 7, ..., 1,024 and more
_HELD = 256  # tallies that are held before they are put together
BINS = 15  # of the confidence, equally wide (Guo et al. 2017, arXiv 1706.04599)


@dataclass(frozen=True)
class Tally:
    """Some sequences' results: one entry a sequence, n of them, ordered by ``number``; or sums of whole numbers.

    The sums of floating-point numbers are a sequence's own. Adding these up is left to the end, where they all stand in
    their order, so that the sum does not depend on how the sequences were shared out.
    """

    number: Integers  # (n,) place in the evaluation's order
    tokens: Integers  # (n,) length without padding
    targets: Integers  # (n,)
    loss: Floats  # (n,) sum over the targets, nats
    correct: Integers  # (n,) targets that are the most probable token
    near: Integers  # (n,) targets among the k most probable tokens
    confidence: Floats  # (n, BINS) sum of the largest probability, of the targets in each bin
    depth_loss: Floats  # (n, DEPTHS) of families: the loss by how many members of a row come before a target,
    depth_targets: Integers  # (n, DEPTHS) and their targets; (n, 0) of other samples
    bin_targets: Integers  # (BINS,)
    bin_correct: Integers  # (BINS,)
    wanted: Integers  # (V,) how often each token was a target,
    predicted: Integers  # (V,) was the most probable,
    hits: Integers  # (V,) and both
    extent: Integers  # (3,) bytes and words that the targets stand for; and whether they were measured

    @staticmethod
    def empty(vocabulary: int, depths: int = 0) -> Tally:
        none, real = np.zeros(0, np.int64), np.zeros(0)
        bins, tokens = np.zeros(BINS, np.int64), np.zeros(vocabulary, np.int64)
        rows = (
            none,
            none,
            none,
            real,
            none,
            none,
            np.zeros((0, BINS)),
            np.zeros((0, depths)),
            np.zeros((0, depths), np.int64),
        )
        return Tally(*rows, bins, bins, tokens, tokens, tokens, np.zeros(3, np.int64))

    @staticmethod
    def merged(parts: Sequence[Tally]) -> Tally:
        """All of them as one, in the order of the sequences' numbers."""
        number = np.concatenate([part.number for part in parts])
        order = np.argsort(number, kind="stable")
        values = {}
        for item in fields(Tally):
            arrays = [getattr(part, item.name) for part in parts]
            per_sequence = item.name in _PER_SEQUENCE
            values[item.name] = np.concatenate(arrays)[order] if per_sequence else np.sum(arrays, axis=0)
        return Tally(**values)

    @staticmethod
    def of_one(parts: Sequence[Tally]) -> Tally:
        """The parts of one sequence as one; its extent is that of the first, which knows all of it."""
        added = {
            item.name: np.sum([getattr(part, item.name) for part in parts], axis=0)
            for item in fields(Tally)
            if item.name not in ("number", "extent")
        }
        return Tally(**added, number=parts[0].number, extent=parts[0].extent)

    def save(self, file: IO[bytes]) -> None:
        """Small: of a large vocabulary a batch has few tokens."""
        np.savez_compressed(file, **{item.name: getattr(self, item.name) for item in fields(Tally)})

    @staticmethod
    def load(file: IO[bytes]) -> Tally:
        with np.load(file, allow_pickle=False) as arrays:
            return Tally(**{item.name: arrays[item.name] for item in fields(Tally)})


_PER_SEQUENCE = ("number", "tokens", "targets", "loss", "correct", "near", "confidence", "depth_loss", "depth_targets")


def gathered(parts: Iterable[Tally]) -> Tally:
    """All of one or more as one, few of them at a time."""
    held: list[Tally] = []
    for part in parts:
        held.append(part)
        if len(held) > _HELD:
            held = [Tally.merged(held)]
    return Tally.merged(held)
