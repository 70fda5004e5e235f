"""Samples cut from a prepared corpus: for any sample number which tokens it has, computed for thousands at once.

A Plan says where samples lie and how many targets they have; reading their tokens is a second step, for those of one
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from longseq_data.corpus.corpus import Corpus
from longseq_data.randomness import generator, uniforms
from longseq_data.vocabulary import IGNORE

from .corpus_stream import CorpusStream, Integers
from .masking import masked_counts
from .order import endless_order, permutation

CHUNK = 1024  # records, or windows, planned at once in an evaluation


@dataclass(frozen=True)
class Plan:
    """Where samples lie: arrays of int64, one entry a sample."""

    numbers: Integers  # in the order: they decide masks
    records: Integers  # of crops
    starts: Integers  # first token: of a record's row [BOS] residues [EOS], or of the stream
    sizes: Integers  # tokens, with the one beyond the last position that a causal sample needs as a target
    scored: Integers  # targets

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: slice | Integers | np.ndarray) -> Plan:
        return Plan(*(getattr(self, item.name)[which] for item in fields(self)))

    @staticmethod
    def joined(plans: Iterable[Plan]) -> Plan:
        parts = list(plans)
        return Plan(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Plan)))


class Cut(Protocol):
    """A way to cut a corpus into samples of at most ``length`` positions."""

    epoch: int  # samples

    def plan(self, samples: Integers) -> Plan:
        """Where samples of the endless order lie, by their numbers."""
        ...

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        """The samples of one pass, those with targets, numbered from 0; ``sampled``: in a random order."""
        ...

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        """(record, first, last): the ordinary tokens of records that causal samples have as targets."""
        ...

    def tokens(self, plan: Plan, out: npt.NDArray, segments: npt.NDArray | None) -> None:
        """Row i of ``out``, (B, longest sample): the tokens of sample i, and IGNORE after them.

        segments: likewise, of a cut with reset: the document of each token, and -1 after them.
        """
        ...


class Crops:
    """One record a sample: its row [BOS] residues [EOS], or ``length`` positions of it. Pictures have no EOS."""

    def __init__(self, corpus: Corpus, length: int, objective: str, seed: int, crop: str) -> None:
        self.corpus, self.length, self.seed, self.crop = corpus, length, seed, crop
        self.causal = objective == "causal"
        self.size = length + self.causal
        self.epoch = len(corpus)

    def plan(self, samples: Integers) -> Plan:
        records = endless_order(samples, self.epoch, self.seed)
        slack = np.maximum(self._rows(records) - self.size, 0)
        if self.crop == "random":
            starts = (uniforms(self.seed, "crop", samples) * (slack + 1)).astype(np.int64)
        else:
            starts = np.zeros_like(slack)
        return self._at(samples, records, starts)

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        number = 0
        for first in range(0, self.epoch, CHUNK):
            records = np.arange(first, min(first + CHUNK, self.epoch))
            if sampled:
                records = permutation(self.epoch, 0, 0)(records)
            starts = np.zeros_like(records)
            if self.crop == "random":  # all of it
                windows = -(-(self._rows(records) - self.causal) // self.length)
                starts = (np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)) * self.length
                records = np.repeat(records, windows)
            plan = self._at(np.zeros_like(records), records, starts)
            plan = _numbered(plan[plan.scored > 0], number)
            number += len(plan)
            yield plan

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        first, last = residues_of(plan.starts + 1, plan.sizes - 1, self.corpus.lengths(plan.records))
        yield from zip(plan.records.tolist(), first.tolist(), last.tolist(), strict=True)

    def tokens(self, plan: Plan, out: npt.NDArray, segments: npt.NDArray | None = None) -> None:
        vocabulary = self.corpus.vocabulary
        length = self.corpus.lengths(plan.records)
        first, last = residues_of(plan.starts, plan.sizes, length)
        begun = plan.starts == 0
        # Residues begin at column 1 after a BOS, and at 0 elsewhere. So that all rows can be gathered alike, those with
        # a BOS take the token before the record along, which BOS then covers; before the first record there is none.
        begins = self.corpus.offsets[plan.records] + first - begun
        edge = np.flatnonzero(begins < 0)
        sizes = last - first + begun
        begins[edge] += 1
        sizes[edge] -= 1
        self.corpus.gather(begins, sizes, out, IGNORE)
        for row in edge.tolist():
            out[row, 1 : last[row] + 1] = self.corpus.read(0, int(last[row]))
        out[begun, 0] = vocabulary.bos
        ended = np.flatnonzero(plan.starts + plan.sizes == length + 2)
        out[ended, plan.sizes[ended] - 1] = vocabulary.eos

    def _rows(self, records: Integers) -> Integers:
        return self.corpus.lengths(records) + 1 + self.corpus.closed  # with BOS and EOS

    def _at(self, numbers: Integers, records: Integers, starts: Integers) -> Plan:
        sizes = np.minimum(self._rows(records) - starts, self.size)
        if self.causal:
            return Plan(numbers, records, starts, sizes, sizes - 1)
        first, last = residues_of(starts, sizes, self.corpus.lengths(records))
        return Plan(numbers, records, starts, sizes, masked_counts(last - first))


class Joined:
    """All records joined and cut: every window full, an epoch is once round the stream from an offset of its own.

    The last window of an epoch reaches into what its first one has had: less than ``length`` tokens come twice.
    """

    def __init__(self, corpus: Corpus, length: int, objective: str, seed: int, reset: bool) -> None:
        self.corpus, self.length, self.seed, self.reset = corpus, length, seed, reset
        self.causal = objective == "causal"
        self.size = length + self.causal
        self.stream = CorpusStream(corpus, reset)
        self.epoch = -(-self.stream.total // length)
        self._offset = lru_cache(maxsize=16)(self._drawn_offset)

    def __reduce__(self) -> tuple:
        objective = "causal" if self.causal else "masked"
        return Joined, (self.corpus, self.length, objective, self.seed, self.reset)

    def plan(self, samples: Integers) -> Plan:
        epochs = samples // self.epoch
        offsets = np.empty_like(samples)
        for epoch in np.unique(epochs).tolist():
            offsets[epochs == epoch] = self._offset(epoch)
        windows = endless_order(samples, self.epoch, self.seed)
        starts = (offsets + windows * self.length) % self.stream.total
        return self._at(samples, starts, np.full_like(starts, self.size))

    def evaluation(self, sampled: bool) -> Iterator[Plan]:
        # A pass begins with EOS, which stands before all other records too; see streaming.evaluation_windows. With
        # reset each document has its BOS.
        first = 0 if self.reset else -1
        tokens = self.stream.total - first
        windows = -(-(tokens - self.causal) // self.length)
        number = 0
        for begin in range(0, windows, CHUNK):
            chosen = np.arange(begin, min(begin + CHUNK, windows))
            if sampled:
                chosen = permutation(windows, 0, 0)(chosen)
            starts = chosen * self.length
            plan = self._at(np.zeros_like(starts), starts + first, np.minimum(tokens - starts, self.size))
            plan = _numbered(plan[plan.scored > 0], number)  # a lone EOS at the end has nothing to predict it from
            number += len(plan)
            yield plan

    def spans(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        begins = np.maximum(plan.starts + 1, 0)
        ends = plan.starts + plan.sizes
        firsts, lasts = self.stream.record_at(begins), self.stream.record_at(ends - 1)
        for begin, end, first, last in zip(*(each.tolist() for each in (begins, ends, firsts, lasts)), strict=True):
            for record in range(first, last + 1):
                base = int(self.corpus.offsets[record]) + self.stream.marks * record + self.stream.bos
                length = int(self.corpus.lengths(record))
                yield record, min(max(begin - base, 0), length), min(max(end - base, 0), length)

    def tokens(self, plan: Plan, out: npt.NDArray, segments: npt.NDArray | None) -> None:
        size = int(plan.sizes.max())
        if plan.sizes.min() == size == out.shape[1] and plan.starts.min() >= 0:
            self.stream.fill(plan.starts, out, segments)
            return
        out[...] = IGNORE
        if segments is not None:
            segments[...] = -1
        for i, (start, size) in enumerate(zip(plan.starts.tolist(), plan.sizes.tolist(), strict=True)):
            begun = int(start < 0)
            if begun:
                out[i, 0] = self.corpus.vocabulary.eos
            here = np.s_[i : i + 1, begun:size]
            self.stream.fill(np.array([start + begun]), out[here], None if segments is None else segments[here])

    def _drawn_offset(self, epoch: int) -> int:
        return int(generator(self.seed, "offset", epoch).random() * self.stream.total)

    def _at(self, numbers: Integers, starts: Integers, sizes: Integers) -> Plan:
        ends = starts + sizes
        if not self.causal:
            residues = self.stream.residues_before(ends) - self.stream.residues_before(np.maximum(starts, 0))
            scored = masked_counts(residues)
        elif self.reset:  # no document tells how the next one begins
            documents = self.stream.documents_before(ends) - self.stream.documents_before(starts + 1) + 1
            scored = sizes - documents
        else:
            scored = sizes - 1
        return Plan(numbers, np.zeros_like(starts), starts, sizes, scored)


def rounds(plans: Iterable[Plan], size: int, most: int | None) -> Iterator[Plan]:
    """The same samples, ``size`` at a time, and ``most`` of them in all."""
    held: list[Plan] = []
    count = 0  # in ``held``
    left = most
    for plan in plans:
        part = plan if left is None else plan[:left]
        left = None if left is None else left - len(part)
        held.append(part)
        count += len(part)
        if count >= size or left == 0:
            whole = Plan.joined(held)
            for first in range(0, count - count % size, size):
                yield whole[first : first + size]
            held, count = [whole[count - count % size :]], count % size
        if left == 0:
            break
    if count:
        yield Plan.joined(held)


def residues_of(starts: Integers, sizes: Integers, length: Integers) -> tuple[Integers, Integers]:
    """The residues [first, last) among the tokens [start, start + size) of a row [BOS] residues [EOS]."""
    first = np.maximum(starts, 1) - 1
    return first, np.maximum(first, np.minimum(starts + sizes - 1, length))


def _numbered(plan: Plan, first: int) -> Plan:
    return Plan(np.arange(first, first + len(plan)), plan.records, plan.starts, plan.sizes, plan.scored)
